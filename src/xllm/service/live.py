"""One admitted request on its way: journal, buffer to the consumer, credit, time limits.

The implementation of `RequestStream`. All calls are made on the front's event loop. It ends
exactly once, whichever comes first: all choices done, an error, the consumer leaving.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from xllm.clock import Clock
from xllm.errors import AbortedError, CapacityError, DeadlineError, InternalError, XllmError
from xllm.service.journal import RequestJournal
from xllm.service.stream import Delta, Usage
from xllm.types import RequestSpec
from xllm.wire.messages import CREDIT_WINDOW, Frame

log = logging.getLogger(__name__)

COMMIT_EVERY = CREDIT_WINDOW // 4
"""Commit counts travel when a choice has advanced this far; the window never runs dry by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """From FrontConfig: what a consumer may leave unread, and for how long."""

    buffer_tokens: int
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveHooks:
    """How a live request reaches the rest of the front.

    `ended(live, abort)` is called exactly once; `abort` tells whether the engine still works on it.
    """

    commit: Callable[[str, int, int], None]
    delivered: Callable[[LiveRequest, Delta], None]
    ended: Callable[[LiveRequest, bool], None]


class LiveRequest:
    """See `RequestStream`. Iterate once; breaking out of the loop aborts the request."""

    def __init__(
        self,
        journal: RequestJournal,
        *,
        clock: Clock,
        limits: StreamLimits,
        hooks: LiveHooks,
        deadline_s: float | None,
    ) -> None:
        self.request_id = journal.spec.request_id
        self.prompt_token_ids = journal.spec.prompt_token_ids
        self.journal = journal
        self.submitted_s = clock.monotonic_s()
        self.error: XllmError | None = None
        self.ended = False
        self._clock = clock
        self._limits = limits
        self._hooks = hooks
        self._deadline_s = deadline_s
        self._stalled_since_s: float | None = None
        self._buffer: deque[Delta] = deque()
        self._num_buffered = 0
        self._committed = [0] * len(journal.choices)
        self._loop = asyncio.get_running_loop()
        self._waiters: list[asyncio.Future[None]] = []
        self._listener: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    # -- the consumer's side ------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas()

    async def wait_ready(self) -> None:
        """Return once a delta or the end can be had without waiting. May be cancelled without harm."""
        while not self._buffer and not self.ended:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def listen(self, listener: Callable[[], None] | None) -> None:
        self._listener = listener

    async def aclose(self) -> None:
        """Abort the request unless it has ended; idempotent."""
        self.leave()

    def usage(self) -> Usage:
        return self.journal.usage()

    def leave(self) -> None:
        """The consumer is gone. Needs no event loop turn, so that it works in any clean-up."""
        self._drop_buffer()
        self._end(AbortedError("the request was aborted"), abort=True)

    async def _deltas(self) -> AsyncIterator[Delta]:
        try:
            while True:
                await self.wait_ready()
                while (delta := self.take()) is not None:
                    yield delta
                if self.ended:
                    break
            if self.error is not None:
                raise self.error
        finally:
            self.leave()

    def take(self) -> Delta | None:
        """The next delta, None when there is none now."""
        if not self._buffer:
            return None
        had_room = self._has_room
        delta = self._buffer.popleft()
        self._num_buffered -= _weight(delta)
        if not had_room:
            # With room before, what is due has been committed when it came.
            self._stalled_since_s = None if self._has_room else self._clock.monotonic_s()
            self._commit()
        return delta

    # -- the front's side ---------------------------------------------------------------------

    def deliver(self, frame: Frame) -> None:
        """Absorb a frame. A frame that cannot be absorbed ends this request and nothing else."""
        if self.ended:
            return
        try:
            delta = self.journal.absorb(frame)
        except XllmError as error:
            self._end(error, abort=not frame.last)
            return
        except Exception:
            log.exception("request %s: a frame could not be absorbed", self.request_id)
            self._end(InternalError("the front failed on the output of this request"), abort=not frame.last)
            return
        if delta is not None:
            self._buffer.append(delta)
            self._num_buffered += _weight(delta)
            self._hooks.delivered(self, delta)
            self._notify()
        if self.journal.ended:
            self._end(None, abort=self._engine_goes_on(frame))
            return
        if self._has_room:
            if delta is not None:
                self._commit_choice(delta.choice)
        elif self._stalled_since_s is None:
            self._stalled_since_s = self._clock.monotonic_s()
            self._arm()

    def begin_attempt(self) -> RequestSpec:
        """The request as the next engine gets it; its credit starts at the end of the log."""
        left_ms: float | None = None
        if self._deadline_s is not None:
            # It ends by its timer, not by a limit that the engine would refuse.
            left_ms = max(1.0, (self._deadline_s - self._clock.monotonic_s()) * 1000)
        self._committed = [len(choice.tokens) for choice in self.journal.choices]
        return self.journal.begin_attempt(left_ms)

    def fail(self, error: XllmError, *, abort: bool = True) -> None:
        """End with `error` after what is buffered; nothing happens if it has ended."""
        self._end(error, abort=abort)

    def check_time(self) -> None:
        """End the request if one of its time limits has passed. Called by its timer and by the front."""
        now_s = self._clock.monotonic_s()
        if self.ended:
            return
        if self._deadline_s is not None and now_s >= self._deadline_s:
            self._end(DeadlineError("the request's deadline passed"), abort=True)
        elif (stall_s := self._stall_due_s()) is not None and now_s >= stall_s:
            self._drop_buffer()
            message = "the response was not read for too long"
            self._end(CapacityError(message, code="slow_reader"), abort=True)
        else:
            self._arm()

    # -- inside -------------------------------------------------------------------------------

    @property
    def _has_room(self) -> bool:
        return self._num_buffered < self._limits.buffer_tokens

    def _commit(self) -> None:
        """Extend the engine's credit while the consumer keeps up. A choice that has ended gets no more."""
        if self.ended or not self._has_room:
            return
        for index in range(len(self.journal.choices)):
            self._commit_choice(index)

    def _commit_choice(self, index: int) -> None:
        choice = self.journal.choices[index]
        count = len(choice.tokens)
        if choice.finish_reason is None and count - self._committed[index] >= COMMIT_EVERY:
            self._committed[index] = count
            self._hooks.commit(self.request_id, index, count)

    def _engine_goes_on(self, frame: Frame) -> bool:
        """A stop string ended the request here, the engine does not know yet."""
        return not frame.last and any(isinstance(c.stop_reason, str) for c in self.journal.choices)

    def _notify(self) -> None:
        if self._listener is not None:
            self._listener()
        if not self._waiters:
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():  # cancelled
                waiter.set_result(None)

    def _drop_buffer(self) -> None:
        self._buffer.clear()
        self._num_buffered = 0

    def _end(self, error: XllmError | None, *, abort: bool) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._notify()
        self._hooks.ended(self, abort)

    def _stall_due_s(self) -> float | None:
        return None if self._stalled_since_s is None else self._stalled_since_s + self._limits.stall_s

    def _arm(self) -> None:
        due = [d for d in (self._deadline_s, self._stall_due_s()) if d is not None]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due:
            # At least a tick: the loop's clock and ours may differ by a rounding.
            delay_s = max(0.001, min(due) - self._clock.monotonic_s())
            self._timer = self._loop.call_later(delay_s, self.check_time)


def _weight(delta: Delta) -> int:
    return max(1, len(delta.token_ids))
