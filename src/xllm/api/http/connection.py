"""One TCP connection: requests one after another, each under its limits of size and time.

States: waiting (for a head), busy (one handler task), closing (input is discarded). A request is
started only after the reply to the one before it ended, so replies never interleave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from xllm.api.error_map import error_reply
from xllm.api.http.body import BodyDecoder, ChunkedBody, LengthBody
from xllm.api.http.exchange import Handler, Reply, Request
from xllm.api.http.head import Head, check_start, parse_head
from xllm.api.http.limits import HttpLimits
from xllm.errors import DeadlineError, RequestError, UnavailableError, XllmError
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
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._buffer = bytearray()
        self._scanned = 0
        self._discarding = False
        self._close_after = False
        self._eof = False
        # Of the running request:
        self._task: asyncio.Task[None] | None = None
        self._request: Request | None = None
        self._reply: Reply | None = None
        self._decoder: BodyDecoder | None = None
        self._body = bytearray()
        self._body_start_s = 0.0

    # -- the transport's calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  asyncio's promise, not data
        self._transport = transport
        transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        if not self._keeper.admit(self):
            self._refuse(UnavailableError("Too many connections.", code="too_many_connections"))
            transport.close()  # at once: lingering would add to what is already too much
            return
        self._arm(self._limits.header_timeout_s, self._head_late)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        if self._task is None:
            if not self._buffer:
                self._arm(self._limits.header_timeout_s, self._head_late)
            self._buffer += data
            self._next_request()
        elif self._decoder is not None and not self._decoder.done:
            self._feed_body(data)
        else:
            self._keep_pipelined(data)

    def eof_received(self) -> bool:
        self._eof = True
        if self._task is None or (self._decoder is not None and not self._decoder.done):
            self._transport.abort() if self._task else self._transport.close()
            return False
        # A half-closed client is still owed its answer, a vanished one is not; only writing tells.
        for delay in _PROBE_TIMES_S:
            self._loop.call_later(delay, self._probe, self._task)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._discarding = True
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        self._keeper.forget(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- what an exchange needs -----------------------------------------------------------------

    def start_body(self) -> None:
        if self._request is None:
            return
        head = self._request.head
        if (head.content_length or 0) > self._limits.max_body_bytes:
            raise self._too_large()
        if head.expects_continue and self._decoder is not None and not self._decoder.done:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def keeps_alive(self) -> bool:
        unread = self._decoder is not None and not self._decoder.done
        return not (self._close_after or self._keeper.draining or self._eof or unread)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        if self._writable.is_set():
            return
        try:
            await asyncio.wait_for(self._writable.wait(), self._limits.write_timeout_s)
        except TimeoutError:
            self._transport.abort()
            raise ConnectionResetError("the client stopped reading") from None

    # -- what the listener needs ----------------------------------------------------------------

    def stop_waiting(self, error: XllmError) -> None:
        """Close a connection that waits for a head; one with half a head is told `error`."""
        if self._buffer:
            self._refuse(error)
        else:
            self._close(linger=False)

    def abort(self) -> None:
        self._transport.abort()

    # -- heads ----------------------------------------------------------------------------------

    def _next_request(self) -> None:
        if self._buffer[:2] == b"\r\n":  # RFC 9112 §2.2: one empty line after the last body
            del self._buffer[:2]
        try:
            head = self._take_head()
        except XllmError as error:
            self._refuse(error)
            return
        if head is not None:
            self._start(head)

    def _take_head(self) -> Head | None:
        buffer, seen = self._buffer, self._scanned
        end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
        if end >= 0:
            block = bytes(buffer[:end])
            del buffer[: end + 4]
            self._scanned = 0
            return parse_head(block, self._limits)
        if buffer.count(b"\n", seen) != buffer.count(b"\r\n", max(0, seen - 1)):
            raise RequestError("A line does not end in CRLF.", code="bad_request")
        # Only the first line can be judged early; beyond it just the size matters.
        if buffer and (seen <= self._limits.max_target_bytes or len(buffer) > self._limits.max_head_bytes):
            check_start(bytes(buffer), self._limits)
        self._scanned = len(buffer)
        return None

    def _start(self, head: Head) -> None:
        self._disarm()
        named = head.values(b"x-request-id")
        client_id = named[0].decode("latin-1") if len(named) == 1 else None
        request_id = echoable(client_id) or new_request_id()
        self._request = request = Request(head, request_id, self)
        self._reply = reply = Reply(head, request_id, self)
        self._body = bytearray()
        self._decoder = ChunkedBody() if head.chunked else LengthBody(head.content_length or 0)
        self._keeper.mark(self, busy=True)
        if not head.has_body:
            self._decoder.done = True
            request.deliver(b"")
        else:
            self._body_start_s = self._loop.time()
            self._arm(self._limits.body_timeout_s, self._body_late)
            rest, self._buffer = bytes(self._buffer), bytearray()
            if rest:
                self._feed_body(rest)
        self._task = self._loop.create_task(self._run(request, reply))

    # -- bodies ---------------------------------------------------------------------------------

    def _feed_body(self, data: bytes) -> None:
        request, decoder = self._request, self._decoder
        if request is None or decoder is None or self._close_after:
            return
        if (request.head.content_length or 0) > self._limits.max_body_bytes:
            return  # refused in start_body; nothing of it is kept
        try:
            body, rest = decoder.feed(data)
        except RequestError as error:
            self._fail_body(error)
            return
        self._body += body
        if len(self._body) > self._limits.max_body_bytes:
            self._fail_body(self._too_large())
        elif decoder.done:
            self._disarm()
            request.deliver(bytes(self._body))
            self._body = bytearray()
            self._keep_pipelined(rest)

    def _fail_body(self, error: XllmError) -> None:
        self._disarm()
        self._close_after = True
        self._body = bytearray()
        if self._request is not None:
            self._request.fail(error)

    def _too_large(self) -> RequestError:
        limit = self._limits.max_body_bytes
        return RequestError(f"The body may have at most {limit} bytes.", code="request_too_large")

    def _keep_pipelined(self, data: bytes) -> None:
        # Reading goes on in any case: only then is a client that leaves noticed.
        if len(self._buffer) + len(data) <= self._limits.max_pipelined_bytes:
            self._buffer += data
        else:
            self._close_after = True
            self._buffer.clear()

    # -- the handler ----------------------------------------------------------------------------

    async def _run(self, request: Request, reply: Reply) -> None:
        try:
            await self._handler(request, reply)
        except ConnectionError:
            self._transport.abort()
        except Exception as error:  # noqa: BLE001  the request boundary: one request fails, not the server
            answer = error_reply(error, request.request_id)
            if reply.started:
                self._transport.abort()
            else:
                reply.send_now(answer.status, answer.body, answer.headers)
        finally:
            self._task = None
        self._finished(reply)

    def _finished(self, reply: Reply) -> None:
        self._disarm()
        self._request = self._reply = None
        if not reply.ended:
            self._transport.abort()
        elif not reply.keep_alive or not self.keeps_alive():
            unread = self._close_after or (self._decoder is not None and not self._decoder.done)
            self._close(linger=unread or bool(self._buffer))
        else:
            self._decoder = None
            self._keeper.mark(self, busy=False)
            self._arm(self._limits.keep_alive_timeout_s, self._idle_late)
            if self._buffer:
                self._arm(self._limits.header_timeout_s, self._head_late)
                self._next_request()

    # -- the end --------------------------------------------------------------------------------

    def _refuse(self, error: XllmError) -> None:
        """An answer made without a handler, then the end."""
        reply = Reply(None, new_request_id(), self)
        answer = error_reply(error, reply.request_id)
        reply.send_now(answer.status, answer.body, answer.headers)
        self._close(linger=True)

    def _close(self, *, linger: bool) -> None:
        """The end. `linger` when input may be unread: closing over it would reset the reply away."""
        self._discarding = True
        self._buffer.clear()
        if self._transport.is_closing():
            return
        if self._eof or not linger:
            self._transport.close()
        else:
            self._transport.write_eof()
            self._arm(self._limits.linger_s, self._transport.close)
        self._loop.call_later(self._limits.linger_s + self._limits.write_timeout_s, self._transport.abort)

    def _probe(self, task: asyncio.Task[None]) -> None:
        if self._task is task and self._reply is not None and not self._reply.probe():
            self._transport.abort()

    def _arm(self, seconds: float, callback: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, callback)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_late(self) -> None:
        self.stop_waiting(DeadlineError("The request head took too long.", code="request_timeout"))

    def _idle_late(self) -> None:
        self._transport.close() if self._writable.is_set() else self._transport.abort()

    def _body_late(self) -> None:
        allowed = self._limits.body_timeout_s + len(self._body) / self._limits.min_body_bytes_per_s
        left = self._body_start_s + allowed - self._loop.time()
        if left > 0.01:
            self._arm(left, self._body_late)
        else:
            self._fail_body(DeadlineError("The request body took too long.", code="request_timeout"))
