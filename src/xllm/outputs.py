"""What `LLM` and `AsyncLLM` return, in vLLM's shape, and how it grows out of deltas.

Plain values and their builder. No engine, no event loop, no tokenising.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm.service.stream import Delta
from xllm.types import TokenLogprobs


@dataclass(slots=True)
class Logprob:
    """`rank` 1 = most likely."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobMap = dict[int, Logprob]
"""Token id → logprob: the token itself first, then the most likely ones."""


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One choice. `stop_reason` is the stop string or stop token id, None for EOS."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobMap] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """One prompt and its choices, sorted by index. `prompt` is None when token ids were given.

    `prompt_logprobs` has one entry per prompt token, None for the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobMap | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int


class OutputBuilder:
    """Collects the deltas of one request. `decode` gives the text of a single token."""

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: tuple[int, ...],
        num_choices: int,
        with_logprobs: bool,
        decode: Callable[[int], str],
    ) -> None:
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._decode = decode
        self._prompt_logprobs: list[TokenLogprobMap | None] | None = None
        self._choices = [
            CompletionOutput(
                index=index,
                text="",
                token_ids=[],
                cumulative_logprob=0.0 if with_logprobs else None,
                logprobs=[] if with_logprobs else None,
                finish_reason=None,
                stop_reason=None,
            )
            for index in range(num_choices)
        ]

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.choice]
        choice.text += delta.text
        choice.token_ids.extend(delta.token_ids)
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        if choice.logprobs is not None and choice.cumulative_logprob is not None:
            choice.logprobs.extend(map(self._map, delta.logprobs))
            choice.cumulative_logprob += sum(entry.token.logprob for entry in delta.logprobs)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *map(self._map, delta.prompt_logprobs)]

    def output(self, num_cached_tokens: int) -> RequestOutput:
        """The output so far. Its lists are its own; later deltas do not change it."""
        outputs = [
            CompletionOutput(
                index=c.index,
                text=c.text,
                token_ids=list(c.token_ids),
                cumulative_logprob=c.cumulative_logprob,
                logprobs=None if c.logprobs is None else list(c.logprobs),
                finish_reason=c.finish_reason,
                stop_reason=c.stop_reason,
            )
            for c in self._choices
        ]
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=list(self._prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            finished=all(c.finish_reason is not None for c in self._choices),
            num_cached_tokens=num_cached_tokens,
        )

    def _map(self, entry: TokenLogprobs) -> TokenLogprobMap:
        return {
            lp.token_id: Logprob(lp.logprob, lp.rank, self._decode(lp.token_id))
            for lp in (entry.token, *entry.top)
        }
