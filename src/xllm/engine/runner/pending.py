"""Tokens that a plan leaves open, since the step before it draws them: where they are, what they became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from xllm.engine.kernels.programs import Pending
from xllm.engine.plan import SequencePlan, StepPlan, StepResult
from xllm.engine.sampling import needs_history
from xllm.errors import InternalError


def open_places(sequences: Sequence[SequencePlan], places: Mapping[int, int]) -> list[Pending]:
    """Where the pending tokens of a plan are; `places`: where those of the one before go, by seq_id."""
    found: list[Pending] = []
    row = -1
    for sequence in sequences:
        row += len(sequence.tokens)
        if sequence.pending:
            if sequence.seq_id not in places:
                raise _nothing_drawn(sequence)
            found.append(Pending(row, places[sequence.seq_id]))
    return found


def resolved(plan: StepPlan, before: StepResult) -> StepPlan:
    """The plan with all tokens known. A sequence that failed goes on with any token: nobody will read it."""
    if not any(s.pending for s in plan.sequences):
        return plan
    drawn = {s.seq_id: s.choices[0].tokens[0].token_id if s.choices else None for s in before.sequences}
    failed = {s.seq_id for s in before.sequences if s.error is not None}
    sequences: list[SequencePlan] = []
    for sequence in plan.sequences:
        if sequence.pending:
            token = 0 if sequence.seq_id in failed else drawn.get(sequence.seq_id)
            if token is None:
                raise _nothing_drawn(sequence)
            sequence = _with_token(sequence, token)
        sequences.append(sequence)
    return msgspec.structs.replace(plan, sequences=tuple(sequences))


def _with_token(sequence: SequencePlan, token: int) -> SequencePlan:
    op = sequence.sample
    if op is not None and needs_history(op.params):
        op = msgspec.structs.replace(op, output=(*op.output, token))
    tokens = (*sequence.tokens[:-1], token)
    return msgspec.structs.replace(sequence, tokens=tokens, sample=op, pending=False)


def _nothing_drawn(sequence: SequencePlan) -> InternalError:
    return InternalError(f"sequence {sequence.seq_id} waits for a token that the step before does not draw")
