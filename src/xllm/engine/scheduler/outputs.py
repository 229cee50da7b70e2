"""Frames: what an engine tells a front about its requests, in the order it happened.

Exactly one frame per request carries `last`; this module is the only place that sets it.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.engine.request import Request, Sequence, SequenceState
from xllm.errors import ErrorInfo
from xllm.types import FinishReason, TokenLogprobs
from xllm.wire.messages import Frame


class FrameBuilder:
    """Collects the frames of one step, by the owner of the request."""

    def __init__(self) -> None:
        self._frames: dict[int, list[Frame]] = {}

    def output(
        self, request: Request, members: Iterable[Sequence], drawn: dict[int, tuple[int, ...]]
    ) -> bool:
        """New tokens of the sequences that drew, with their ends; True if the last one ends the request."""
        ended = request.all_ended
        frames = self._of(request)
        left = len(drawn)
        spec = request.spec
        for seq in members:
            left -= 1
            tokens = drawn[seq.choice]
            finished = seq.state is SequenceState.ENDED
            frames.append(
                Frame(
                    request_id=spec.request_id,
                    attempt=spec.attempt,
                    choice=seq.choice,
                    offset=seq.num_streamed,
                    tokens=tokens,
                    logprobs=tuple(request.token_logprobs.pop(seq.choice, ())),
                    prompt_logprobs=self._prompt_logprobs(request),
                    finish_reason=seq.finish_reason if finished else None,
                    stop_token_id=seq.stop_token_id if finished else None,
                    num_cached_tokens=request.num_cached or 0,
                    queue_ms=request.queue_ms,
                    prefill_ms=request.prefill_ms,
                    num_preemptions=request.num_preemptions,
                    last=ended and left == 0,
                )
            )
            seq.num_streamed += len(tokens)
        return ended

    def terminal(self, request: Request, reason: FinishReason, error: ErrorInfo | None) -> None:
        """The end of a request that did not end by its own tokens."""
        self._of(request).append(
            Frame(
                request_id=request.spec.request_id,
                attempt=request.spec.attempt,
                finish_reason=reason,
                error=error,
                num_cached_tokens=request.num_cached or 0,
                queue_ms=request.queue_ms,
                prefill_ms=request.prefill_ms,
                num_preemptions=request.num_preemptions,
                last=True,
            )
        )

    def take(self) -> dict[int, list[Frame]]:
        frames, self._frames = self._frames, {}
        return frames

    def _of(self, request: Request) -> list[Frame]:
        frames = self._frames.get(request.owner)
        if frames is None:
            frames = self._frames[request.owner] = []
        return frames

    @staticmethod
    def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs, ...]:
        if not request.wants_prompt_logprobs:
            return ()
        request.prompt_logprobs_sent = True
        kept, request.prompt_logprobs = tuple(request.prompt_logprobs), []
        return kept
