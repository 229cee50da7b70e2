"""One request and its reply, as the handler sees them. No parsing, no routes.

The handler runs as one task per request; the task is cancelled as soon as the client is known
to be gone, so a handler's `finally` is the place where work is aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from xllm.api.http.head import Head

HeaderList = Iterable[tuple[str, str]]


class Wire(Protocol):
    """What an exchange needs of its connection."""

    def start_body(self) -> None:
        """The handler wants the body now. Raises RequestError(request_too_large)."""

    def keeps_alive(self) -> bool:
        """Whether the connection may serve another request after this one."""

    def write(self, data: bytes) -> None: ...

    async def drained(self) -> None: ...


class Request:
    """`head` as received; `request_id` is ours or the client's when it is safe to echo."""

    def __init__(self, head: Head, request_id: str, wire: Wire) -> None:
        self.head = head
        self.request_id = request_id
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

    def __init__(self, head: Head | None, request_id: str, wire: Wire) -> None:
        self._wire = wire
        self._bodyless = head is not None and head.method == "HEAD"
        self._chunked = head is not None and not head.http_1_0
        self.keep_alive = head is not None and head.keep_alive
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
        await self._wire.drained()

    def send_now(
        self, status: int, body: bytes, headers: HeaderList = (), content_type: str = "application/json"
    ) -> None:
        """`send` for the connection itself, which cannot wait."""
        more = [("content-type", content_type), *headers, ("content-length", str(len(body)))]
        self._wire.write(self._head(status, more) + (b"" if self._bodyless else body))
        self.ended = True

    def start(self, status: int, content_type: str, headers: HeaderList = ()) -> None:
        """The head of a response of unknown length."""
        more = [("content-type", content_type), *headers]
        if self._chunked:
            more.append(("transfer-encoding", "chunked"))
        else:
            self.keep_alive = False
        self._wire.write(self._head(status, more))

    async def write(self, data: bytes) -> None:
        """One piece; waits while the client reads too slowly."""
        if data and not self._bodyless:
            self._wire.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        await self._wire.drained()

    def probe(self) -> bool:
        """Send something without meaning, so that a vanished client answers with a reset.

        False when the protocol has no such thing (HTTP/1.0).
        """
        if not self._chunked:
            return False
        if not self.started:
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif not self.ended and not self._bodyless:
            self._wire.write(b"3\r\n:\n\n\r\n")
        return True

    async def end(self) -> None:
        if self._chunked and not self._bodyless:
            self._wire.write(b"0\r\n\r\n")
        self.ended = True
        await self._wire.drained()

    def _head(self, status: int, headers: HeaderList) -> bytes:
        self.status = status
        self.keep_alive = self.keep_alive and self._wire.keeps_alive()
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines += [f"{name}: {value}" for name, value in self.extra]
        lines += [f"x-request-id: {self.request_id}", "x-content-type-options: nosniff"]
        lines.append(f"connection: {'keep-alive' if self.keep_alive else 'close'}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


Handler = Callable[[Request, Reply], Awaitable[None]]

_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    421: "Misdirected Request",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
