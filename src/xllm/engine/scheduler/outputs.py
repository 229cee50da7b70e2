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
    """Collects the frames of one step."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []

    def output(
        self, request: Request, members: Iterable[Sequence], drawn: dict[int, tuple[int, ...]]
    ) -> bool:
        """New tokens of the sequences that drew, with their ends; True if the last one ends the request."""
        ended = request.all_ended
        left = len(drawn)
        spec = request.spec
        for seq in members:
            left -= 1
            tokens = drawn[seq.choice]
            finished = seq.state is SequenceState.ENDED
            self._frames.append(
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
                    last=ended and left == 0,
                )
            )
            seq.num_streamed += len(tokens)
        return ended

    def terminal(self, request: Request, reason: FinishReason, error: ErrorInfo | None) -> None:
        """The end of a request that did not end by its own tokens."""
        self._frames.append(
            Frame(
                request_id=request.spec.request_id,
                attempt=request.spec.attempt,
                finish_reason=reason,
                error=error,
                num_cached_tokens=request.num_cached or 0,
                queue_ms=request.queue_ms,
                last=True,
            )
        )

    def take(self) -> tuple[Frame, ...]:
        frames, self._frames = tuple(self._frames), []
        return frames

    @staticmethod
    def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs, ...]:
        if not request.wants_prompt_logprobs:
            return ()
        request.prompt_logprobs_sent = True
        kept, request.prompt_logprobs = tuple(request.prompt_logprobs), []
        return kept
