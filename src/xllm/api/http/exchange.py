"""One request and its reply, as the handler sees them. No parsing, no routes.

The handler runs as one task per request; the task is cancelled as soon as the client is known
to be gone, so a handler's `finally` is the place where work is aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from xllm.api.caller import Caller
from xllm.api.http.cycle import Cycle, HeaderList
from xllm.api.http.head import Head
from xllm.api.http.outbox import Outbox


class Wire(Protocol):
    """What an exchange asks of its connection."""

    def start_body(self) -> None:
        """The handler wants the body now: a client that waits for `100 Continue` gets it."""

    def keeps_alive(self) -> bool:
        """Whether the connection may serve another request after this one."""


class Request:
    """`head` as received; `request_id` is ours or the client's when it is safe to echo.

    `peer` is the address of the other end ('' = unknown), `caller` what the handler found out about it.
    `received_s` is set by the handler, on its clock; `serves` are the ids of the requests made of it.
    """

    def __init__(self, head: Head, request_id: str, wire: Wire, peer: str = "") -> None:
        self.head = head
        self.request_id = request_id
        self.peer = peer
        self.caller = Caller()
        self.received_s: float | None = None
        self.serves: tuple[str, ...] = ()
        self._wire = wire
        self._body = asyncio.get_running_loop().create_future()

    async def body(self) -> bytes:
        """The whole body. Raises RequestError: request_too_large, request_timeout, bad_request."""
        if not self._body.done():
            self._wire.start_body()
        return bytes(await self._body)

    def deliver(self, body: bytes) -> None:
        if not self._body.done():
            self._body.set_result(body)

    def fail(self, error: Exception) -> None:
        if not self._body.done():
            self._body.set_exception(error)
            # The handler may never ask for the body; then nobody needs to hear of this.
            self._body.exception()


class Reply:
    """Exactly one response. `send` for a whole one, or `start`, `write`…, `end`."""

    def __init__(self, cycle: Cycle, head: Head | None, request_id: str, wire: Wire, out: Outbox) -> None:
        """Without a head it answers bytes that were no request, and the connection closes."""
        self._cycle = cycle
        self._wire, self._out = wire, out
        self._may_probe = head is not None and not head.http_1_0
        self.keep_alive = head is not None
        self.request_id = request_id
        self.status = 0
        self.extra: list[tuple[str, str]] = []
        """Headers that any response of this request carries (set before it starts)."""
        self.ended = False

    @property
    def started(self) -> bool:
        return self.status != 0

    async def send(
        self, status: int, body: bytes, headers: HeaderList = (), content_type: str = "application/json"
    ) -> None:
        """A whole response."""
        self.send_now(status, body, headers, content_type)
        await self._out.drained()

    def send_now(
        self, status: int, body: bytes, headers: HeaderList = (), content_type: str = "application/json"
    ) -> None:
        """`send` for the connection itself, which cannot wait."""
        more = [("content-type", content_type), *headers, ("content-length", str(len(body)))]
        self._out.write(self._head(status, more) + self._cycle.data(body) + self._cycle.end())
        self.ended = True

    def start(self, status: int, content_type: str, headers: HeaderList = (), data: bytes = b"") -> None:
        """The head of a response of unknown length, and its first piece if there is one already."""
        head = self._head(status, [("content-type", content_type), *headers])
        self._out.write(head + self._cycle.data(data) if data else head)

    @property
    def writable(self) -> bool:
        """The client keeps up with what is written."""
        return self._out.writable

    def write_now(self, data: bytes) -> None:
        """One piece, of one who sees to it that the client keeps up."""
        self._out.write(self._cycle.data(data))

    async def drained(self) -> None:
        """Wait until the client keeps up again."""
        await self._out.drained()

    async def write(self, data: bytes) -> None:
        """One piece; waits while the client reads too slowly."""
        self._out.write(self._cycle.data(data))
        await self._out.drained()

    def probe(self) -> bool:
        """Send something without meaning, so that a vanished client answers with a reset.

        False when the protocol has no such thing (HTTP/1.0).
        """
        if not self._may_probe:
            return False
        if not self.started:
            self._out.write(self._cycle.go_on())
        elif not self.ended:
            self._out.write(self._cycle.data(b":\n\n"))
        return True

    async def end(self, data: bytes = b"") -> None:
        """`data` is the last piece."""
        self._out.write(self._cycle.data(data) + self._cycle.end() if data else self._cycle.end())
        self.ended = True
        await self._out.drained()

    def _head(self, status: int, headers: HeaderList) -> bytes:
        close = not (self.keep_alive and self._wire.keeps_alive())
        own = [("x-request-id", self.request_id), ("x-content-type-options", "nosniff")]
        data = self._cycle.start(status, [*headers, *self.extra, *own], close=close)
        self.status = status  # only now: a header that h11 refuses leaves room for another answer
        return data


Handler = Callable[[Request, Reply], Awaitable[None]]
