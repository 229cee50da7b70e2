"""Reading one sequence's result: drawn tokens and logprobs go where the frames will look for them.

Split from the scheduler because it decides nothing.
"""

from __future__ import annotations

from xllm.engine.plan import SequencePlan, SequenceResult
from xllm.engine.request import Request, Sequence
from xllm.errors import InternalError


def apply_result(
    seq: Sequence, request: Request, entry: SequencePlan, outcome: SequenceResult
) -> dict[int, tuple[int, ...]]:
    """Keep prompt logprobs and token logprobs; the drawn token ids per choice.

    Raises InternalError when the runner drew for other choices than the plan asked for.
    """
    if outcome.prompt_logprobs:
        request.prompt_logprobs.extend(outcome.prompt_logprobs)
    drawn: dict[int, tuple[int, ...]] = {}
    for choice in outcome.choices:
        drawn[choice.choice] = tuple([t.token_id for t in choice.tokens])
        if request.spec.params.logprobs is not None:
            kept = request.token_logprobs.setdefault(choice.choice, [])
            kept.extend(t.logprobs for t in choice.tokens if t.logprobs is not None)
    asked = entry.sample.choices if entry.sample is not None else ()
    if tuple(drawn) != asked and set(drawn) != set(asked):
        raise InternalError("the runner drew for other choices than the plan asked for")
    return drawn
