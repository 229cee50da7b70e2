"""One TCP connection: requests one after another, each under its limits of size and time.

States: waiting (for a head), busy (one handler task), closing (input is discarded). A request is
started only after the reply to the one before it ended, so replies never interleave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from xllm.api.error_map import error_reply
from xllm.api.http.cycle import Cycle
from xllm.api.http.exchange import Handler, Reply, Request
from xllm.api.http.inbox import Inbox
from xllm.api.http.limits import HttpLimits
from xllm.api.http.outbox import Outbox
from xllm.errors import DeadlineError, UnavailableError, XllmError
from xllm.ids import echoable, new_request_id

_PROBE_TIMES_S = (0.02, 0.1, 0.5)
"""After the client half-closed: two writes are needed to learn of a reset, the third is for slow paths."""


class Keeper(Protocol):
    """Who owns the connections (the listener)."""

    draining: bool

    def admit(self, connection: Connection) -> bool: ...

    def mark(self, connection: Connection, *, busy: bool) -> None: ...

    def forget(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """Created by the listener for each accepted socket."""

    def __init__(self, handler: Handler, limits: HttpLimits, keeper: Keeper) -> None:
        self._handler, self._limits, self._keeper = handler, limits, keeper
        self._loop = asyncio.get_running_loop()
        self._out: Outbox
        self._peer = ""
        self._timer: asyncio.TimerHandle | None = None
        self._inbox = Inbox(limits)
        self._discarding = False
        self._close_after = False
        self._eof = False
        # Of the running request:
        self._task: asyncio.Task[None] | None = None
        self._request: Request | None = None
        self._reply: Reply | None = None
        self._cycle: Cycle | None = None
        self._body_start_s = 0.0

    # -- the transport's calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  asyncio's promise, not data
        self._out = Outbox(transport, self._limits)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self._keeper.admit(self):
            # Without lingering, which would add to what is already too much.
            self._refuse(UnavailableError("Too many connections.", code="too_many_connections"), linger=False)
            return
        self._arm(self._limits.header_timeout_s, self._head_late)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        if self._task is None:
            if not self._inbox:
                self._arm(self._limits.header_timeout_s, self._head_late)
            self._inbox.add(data)
            self._next_request()
        elif self._awaits_body():
            self._feed_body(data)
        else:
            self._keep_ahead(data)

    def eof_received(self) -> bool:
        self._eof = True
        if self._out.is_tls:
            return False  # TLS has no half-closed state here: the transport closes in any case
        if self._task is None or self._awaits_body():
            self._out.abort() if self._task else self._out.close()
            return False
        # A half-closed client is still owed its answer, a vanished one is not; only writing tells.
        for delay in _PROBE_TIMES_S:
            self._loop.call_later(delay, self._probe, self._task)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._discarding = True
        self._out.lost()
        if self._task is not None:
            self._task.cancel()
        self._keeper.forget(self)

    def pause_writing(self) -> None:
        self._out.pause()

    def resume_writing(self) -> None:
        self._out.resume()

    # -- what a request and its reply need ------------------------------------------------------

    def start_body(self) -> None:
        if self._cycle is not None and self._cycle.wants_continue:
            self._out.write(self._cycle.go_on())

    def keeps_alive(self) -> bool:
        return not (self._close_after or self._keeper.draining or self._eof or self._awaits_body())

    # -- what the listener needs ----------------------------------------------------------------

    def stop_waiting(self, error: XllmError) -> None:
        """Close a connection that waits for a head; one with half a head is told `error`."""
        if self._inbox:
            self._refuse(error)
        else:
            self._close(linger=False)

    def abort(self) -> None:
        self._out.abort()

    # -- requests -------------------------------------------------------------------------------

    def _next_request(self) -> None:
        try:
            block = self._inbox.take_head()
            if block is not None:
                self._start(block)
        except XllmError as error:
            self._refuse(error)

    def _start(self, block: bytes) -> None:
        cycle = Cycle(self._limits)
        head = cycle.read_head(block)
        self._disarm()
        named = head.values(b"x-request-id")
        client_id = named[0].decode("latin-1") if len(named) == 1 else None
        request_id = echoable(client_id) or new_request_id()
        self._cycle = cycle
        self._request = request = Request(head, request_id, self, self._peer)
        self._reply = reply = Reply(cycle, head, request_id, self, self._out)
        self._keeper.mark(self, busy=True)
        if cycle.has_whole_request:
            request.deliver(b"")
        else:
            self._body_start_s = self._loop.time()
            self._arm(self._limits.body_timeout_s, self._body_late)
            self._feed_body(self._inbox.take_all())
        self._task = self._loop.create_task(self._run(request, reply))

    def _awaits_body(self) -> bool:
        return self._cycle is not None and not self._cycle.has_whole_request

    def _feed_body(self, data: bytes) -> None:
        request, cycle = self._request, self._cycle
        if request is None or cycle is None or self._close_after:
            return
        try:
            rest = cycle.feed(data)
        except XllmError as error:
            self._fail_body(error)
            return
        if cycle.has_whole_request:
            self._disarm()
            request.deliver(cycle.take_body())
            self._keep_ahead(rest)

    def _fail_body(self, error: XllmError) -> None:
        self._disarm()
        self._close_after = True
        if self._request is not None and self._cycle is not None:
            self._cycle.take_body()
            self._request.fail(error)

    def _keep_ahead(self, data: bytes) -> None:
        # Reading goes on in any case: only then is a client that leaves noticed.
        if not self._inbox.add_ahead(data):
            self._close_after = True

    # -- the handler ----------------------------------------------------------------------------

    async def _run(self, request: Request, reply: Reply) -> None:
        try:
            await self._handler(request, reply)
        except ConnectionError:
            self._out.abort()
        except Exception as error:  # noqa: BLE001  the request boundary: one request fails, not the server
            answer = error_reply(error, request.request_id)
            if reply.started:
                self._out.abort()
            else:
                reply.send_now(answer.status, answer.body, answer.headers)
        finally:
            self._task = None
        self._finished(reply)

    def _finished(self, reply: Reply) -> None:
        self._disarm()
        cycle, unread = self._cycle, self._close_after or self._awaits_body()
        self._cycle = self._request = self._reply = None
        if not reply.ended or cycle is None:
            self._out.abort()
        elif not (reply.keep_alive and cycle.may_go_on and self.keeps_alive()):
            self._close(linger=unread or bool(self._inbox))
        else:
            self._keeper.mark(self, busy=False)
            self._arm(self._limits.keep_alive_timeout_s, self._out.close_idle)
            if self._inbox:
                self._arm(self._limits.header_timeout_s, self._head_late)
                self._next_request()

    # -- the end --------------------------------------------------------------------------------

    def _refuse(self, error: XllmError, *, linger: bool = True) -> None:
        """An answer made without a handler, then the end."""
        reply = Reply(Cycle(self._limits), None, new_request_id(), self, self._out)
        answer = error_reply(error, reply.request_id)
        reply.send_now(answer.status, answer.body, answer.headers)
        self._close(linger=linger)

    def _close(self, *, linger: bool) -> None:
        """The end; what still comes in is dropped."""
        self._disarm()
        self._discarding = True
        self._inbox.clear()
        self._out.close(linger=linger and not self._eof)

    def _probe(self, task: asyncio.Task[None]) -> None:
        if self._task is task and self._reply is not None and not self._reply.probe():
            self._out.abort()

    def _arm(self, seconds: float, callback: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, callback)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_late(self) -> None:
        self.stop_waiting(DeadlineError("The request head took too long.", code="request_timeout"))

    def _body_late(self) -> None:
        num_body_bytes = self._cycle.num_body_bytes if self._cycle else 0
        allowed = self._limits.body_timeout_s + num_body_bytes / self._limits.min_body_bytes_per_s
        left = self._body_start_s + allowed - self._loop.time()
        if left > 0.01:
            self._arm(left, self._body_late)
        else:
            self._fail_body(DeadlineError("The request body took too long.", code="request_timeout"))
