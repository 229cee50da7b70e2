"""The commit log of one request: which tokens are output, and how each choice ended.

The single judge of frames: an older attempt is dropped, an overlap is compared, a gap is an
error, the overrun of a stop string is cut and never counted. Pure: no clock, no I/O, no asyncio.
It lives in the owning front's memory and outlives every engine that works on the request.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from xllm.errors import InternalError
from xllm.service.choice_text import ChoiceText
from xllm.service.stream import Delta, Usage
from xllm.types import FinishReason, RequestSpec, TokenLogprobs
from xllm.wire.messages import Frame


class ChoiceLog:
    """Committed tokens of one choice. `finish_reason` is set once and then nothing changes."""

    def __init__(self, text: ChoiceText) -> None:
        self.text = text
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None


class RequestJournal:
    """Log of all choices. `absorb` turns an engine's frame into what the client may see."""

    def __init__(self, spec: RequestSpec, *, head_width: int, make_text: Callable[[], ChoiceText]) -> None:
        if spec.params.max_tokens is None:
            raise InternalError("a request reached the journal without max_tokens")
        self.spec = spec
        self.attempt = spec.attempt
        self.choices = tuple(ChoiceLog(make_text()) for _ in range(spec.params.n))
        self._num_open = spec.params.n
        self._shows_stop = spec.params.include_stop_str_in_output
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.num_cached_tokens = 0
        self.num_divergences = 0
        self.num_stale_frames = 0
        self.num_committed = 0
        self.queue_ms = 0.0
        self.prefill_ms = 0.0
        self._resumed = False
        self._num_preemptions_before = 0
        self._num_preemptions = 0
        self._max_tokens = spec.params.max_tokens
        self._head_width = head_width
        self._prompt_logprobs: list[TokenLogprobs] | None = (
            None if spec.params.prompt_logprobs is None else []
        )

    @property
    def ended(self) -> bool:
        """Every choice has its finish reason."""
        return self._num_open == 0

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=sum(len(c.tokens) for c in self.choices),
            cached_tokens=self.num_cached_tokens,
        )

    @property
    def num_preemptions(self) -> int:
        """Over all attempts."""
        return self._num_preemptions_before + self._num_preemptions

    def begin_attempt(self, deadline_ms: float | None) -> RequestSpec:
        """What the next engine gets: the same request, continued where the log ends.

        Frames of earlier attempts count for nothing from here on. `deadline_ms` is what is left. What the
        client has of the prompt's logprobs is not computed again; what it lacks is asked for as a whole.
        """
        self.attempt += 1
        self._num_preemptions_before, self._num_preemptions = self.num_preemptions, 0
        params = self.spec.params
        if self._prompt_logprobs is not None:
            self._prompt_logprobs = []
        elif params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        # Queue, prefill and cache of the attempt that answered first are those the client waited for.
        self._resumed = self.num_committed > 0
        return msgspec.structs.replace(
            self.spec,
            params=params,
            attempt=self.attempt,
            deadline_ms=deadline_ms,
            emitted=tuple(tuple(c.tokens) for c in self.choices) if self._resumed else (),
            ended=tuple(i for i, c in enumerate(self.choices) if c.finish_reason is not None),
        )

    def absorb(self, frame: Frame) -> Delta | None:
        """Commit what is new in `frame`; None when it changes nothing that the client sees.

        Raises the engine's error if the frame carries one, InternalError if the frame breaks
        the protocol; the request is then over.
        """
        if frame.attempt != self.attempt:
            self.num_stale_frames += 1
            return None
        if frame.error is not None:
            raise frame.error.to_error()
        if not 0 <= frame.choice < len(self.choices):
            raise InternalError("the engine sent output for a choice that was not asked for")
        if not self._resumed:
            if frame.num_cached_tokens > self.num_cached_tokens:
                self.num_cached_tokens = frame.num_cached_tokens
            if frame.queue_ms > self.queue_ms:
                self.queue_ms = frame.queue_ms
            if frame.prefill_ms > self.prefill_ms:
                self.prefill_ms = frame.prefill_ms
        if frame.num_preemptions > self._num_preemptions:
            self._num_preemptions = frame.num_preemptions
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.extend(frame.prompt_logprobs)
        log = self.choices[frame.choice]
        delta = self._commit(log, frame) if log.finish_reason is None else None
        if frame.last and not self.ended:
            raise InternalError("the engine ended a request before all of its choices")
        return delta

    def _commit(self, log: ChoiceLog, frame: Frame) -> Delta | None:
        tokens, logprobs = frame.tokens, frame.logprobs
        if skip := self._overlap(log, frame):
            tokens, logprobs = tokens[skip:], logprobs[skip:]
        self._check(log, frame, tokens)
        # The EOS or stop token that ended the choice is output, but its text is not shown.
        num_shown = len(tokens)
        if frame.finish_reason is FinishReason.STOP and not self._shows_stop:
            num_shown -= 1
        pieces: list[str] = []
        match: str | None = None
        num_kept = 0
        for token in tokens:
            num_kept += 1
            if num_kept > num_shown:
                break
            piece, match = log.text.push(token)
            pieces.append(piece)
            if match is not None:
                break
        log.tokens.extend(tokens[:num_kept])
        self.num_committed += num_kept
        if match is None and frame.finish_reason is not None:
            piece, match = log.text.finish()
            pieces.append(piece)
        if match is not None:
            self._end(log, FinishReason.STOP, match)
        elif frame.finish_reason is not None:
            self._end(log, frame.finish_reason, frame.stop_token_id)
        if not num_kept and log.finish_reason is None:
            return None
        return Delta(
            choice=frame.choice,
            text="".join(pieces),
            token_ids=tokens[:num_kept],
            logprobs=logprobs[:num_kept],
            prompt_logprobs=self._take_prompt_logprobs(frame.choice),
            finish_reason=log.finish_reason,
            stop_reason=log.stop_reason,
        )

    def _overlap(self, log: ChoiceLog, frame: Frame) -> int:
        """How many of the frame's tokens are in the log already; those stay valid, equal or not."""
        behind = len(log.tokens) - frame.offset
        if behind < 0 or frame.offset < 0:
            raise InternalError("the engine's output has a gap")
        skip = min(behind, len(frame.tokens))
        if skip and tuple(log.tokens[frame.offset : frame.offset + skip]) != frame.tokens[:skip]:
            self.num_divergences += 1
        return skip

    def _check(self, log: ChoiceLog, frame: Frame, tokens: tuple[int, ...]) -> None:
        if len(log.tokens) + len(tokens) > self._max_tokens:
            raise InternalError("the engine produced more than max_tokens")
        if tokens and (min(tokens) < 0 or max(tokens) >= self._head_width):
            raise InternalError("the engine produced a token outside the model's vocabulary")
        if frame.logprobs and len(frame.logprobs) != len(frame.tokens):
            raise InternalError("the engine's logprobs do not match its tokens")
        if frame.finish_reason is FinishReason.ERROR:
            raise InternalError("the engine ended a choice with an error it did not name")

    def _end(self, log: ChoiceLog, reason: FinishReason, stop_reason: str | int | None) -> None:
        """Called once per choice: `absorb` commits nothing to a choice that has ended."""
        log.finish_reason, log.stop_reason = reason.value, stop_reason
        self._num_open -= 1

    def _take_prompt_logprobs(self, choice: int) -> tuple[TokenLogprobs, ...] | None:
        if choice != 0 or self._prompt_logprobs is None:
            return None
        taken, self._prompt_logprobs = tuple(self._prompt_logprobs), None
        return taken
