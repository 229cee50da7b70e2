"""A whole batch gathered into one value per choice, for responses that do not stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm.api.openai.batch import Batch
from xllm.types import TokenLogprobs


@dataclass(slots=True)
class Choice:
    """Everything one choice said. `prompt_logprobs` is that of its prompt, if asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


async def collect(batch: Batch) -> list[Choice]:
    """Run the batch to its end. Raises the first error of any request."""
    choices = [Choice() for _ in range(batch.num_choices)]
    pieces: list[list[str]] = [[] for _ in choices]
    async for index, delta in batch.deltas():
        choice = choices[index]
        pieces[index].append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            first = index - index % batch.n
            for same_prompt in choices[first : first + batch.n]:
                same_prompt.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
    for choice, parts in zip(choices, pieces, strict=True):
        choice.text = "".join(parts)
    return choices
