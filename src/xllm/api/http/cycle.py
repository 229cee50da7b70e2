"""One request and its response in h11: the only place that speaks to it.

h11 parses the head, ends the body, writes the response and knows whether the connection may go on.
Ours are the bounds it has no setting for: of the body, of chunk lines and of the number of chunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

import h11

from xllm.api.http.head import Head, read_head
from xllm.api.http.limits import HttpLimits
from xllm.errors import RequestError

HeaderList = Iterable[tuple[str, str]]

# A size of at most nine digits (64 GiB), a short extension, and no trailer after the last chunk: h11
# takes any of these without limit. This looks at one line at a time; where chunks are, h11 says.
_EXTENSION = rb"(?:;[\t\x20-\x7e\x80-\xff]{0,240})?"
_CHUNK_LINE = re.compile(rb"(?:0{1,9}%b\r\n|(?!0+[;\r])[0-9A-Fa-f]{1,9}%b)\r\n" % (_EXTENSION, _EXTENSION))
_CHUNK_LINE_START = re.compile(rb"(?:[0-9A-Fa-f]{1,9}%b(?:\r|\r\n\r?)?)?" % _EXTENSION)
_FEED_BYTES = 16 * 1024
"""h11 gets chunks in pieces of this size: what it has not consumed is copied for each chunk line."""

_CHUNKED_LINE = b"\r\ntransfer-encoding: chunked\r\n"
"""In a response's head: h11 chose to send chunks."""

_STATUS_TEXT = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}


class Cycle:
    """Its own h11 connection: bytes of the next request must pass our checks before any h11 sees them."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._h11 = h11.Connection(h11.SERVER)
        self._body = bytearray()
        self._declared_bytes = 0
        self._chunked = False
        self._num_chunks = 0
        self._line_is_due = False
        self._bodyless = False
        self._sends_chunks = False
        self.has_whole_request = False

    # -- the request ----------------------------------------------------------------------------

    def read_head(self, block: bytes) -> Head:
        """`block` has passed `check_head`. Raises RequestError: bad_request, expectation_failed."""
        self._h11.receive_data(block)
        request = self._next_event()
        if not isinstance(request, h11.Request):
            raise RequestError("The request is not valid HTTP.", code="bad_request")
        head = read_head(request)
        self._bodyless = head.method == "HEAD"
        self._declared_bytes = head.content_length or 0
        self._chunked = self._line_is_due = head.chunked
        self._take_events()
        return head

    def feed(self, data: bytes) -> bytes:
        """Bytes of the body; returns those that follow the request once it is whole.

        Raises RequestError: bad_request, request_too_large.
        """
        if self._declared_bytes > self._limits.max_body_bytes:
            raise _too_large(self._limits)  # even before the first byte
        step = _FEED_BYTES if self._chunked else max(1, len(data))
        for at in range(0, len(data), step):
            self._h11.receive_data(data[at : at + step])
            self._take_events()
            if self.has_whole_request:
                return self._h11.trailing_data[0] + data[at + step :]
        return b""

    @property
    def num_body_bytes(self) -> int:
        return len(self._body)

    def take_body(self) -> bytes:
        body = bytes(self._body)
        self._body = bytearray()
        return body

    @property
    def wants_continue(self) -> bool:
        """The client waits for `100 Continue` before it sends the body."""
        return self._h11.they_are_waiting_for_100_continue

    def _take_events(self) -> None:
        while not self.has_whole_request and not (self._line_is_due and not self._chunk_line_is_whole()):
            event = self._next_event()
            if isinstance(event, h11.Data):
                self._body += event.data
                self._line_is_due = event.chunk_end
                if len(self._body) > self._limits.max_body_bytes:
                    raise _too_large(self._limits)
            elif isinstance(event, h11.EndOfMessage):
                self.has_whole_request = True
            else:
                return

    def _chunk_line_is_whole(self) -> bool:
        """Whether h11 may read on: it holds a complete chunk line, and a good one."""
        pending = self._h11.trailing_data[0]
        if self._num_chunks:  # the end of the chunk before comes first
            if not pending.startswith(b"\r\n"):
                if pending not in (b"", b"\r"):
                    raise _bad_body()
                return False
            pending = pending[2:]
        if not _CHUNK_LINE.match(pending):
            if not _CHUNK_LINE_START.fullmatch(pending):
                raise _bad_body()
            return False
        self._num_chunks += 1
        self._line_is_due = False
        # Each chunk costs far more time than its bytes, so crumbs are limited more tightly than bytes.
        if self._num_chunks > self._limits.max_small_chunks + len(self._body) // 64:
            raise RequestError("The body has too many small chunks.", code="request_too_large")
        return True

    def _next_event(self) -> object:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            # h11's text quotes the client; ours is fixed.
            raise RequestError("The request is not valid HTTP.", code="bad_request") from error

    # -- the response ---------------------------------------------------------------------------

    def go_on(self) -> bytes:
        """`100 Continue`; allowed any number of times before `start`."""
        return self._h11.send(
            h11.InformationalResponse(status_code=100, headers=[], reason=_STATUS_TEXT[100])
        )

    def start(self, status: int, headers: HeaderList, *, close: bool) -> bytes:
        """The response's head; without a content-length h11 frames the body as the client's version allows.

        Raises h11.LocalProtocolError for a header that must not be sent; then nothing has begun.
        """
        lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        if close:
            lines.append((b"connection", b"close"))
        reason = _STATUS_TEXT.get(status, b"")
        head = self._h11.send(h11.Response(status_code=status, headers=lines, reason=reason))
        self._sends_chunks = _CHUNKED_LINE in head.lower()
        return head

    def data(self, data: bytes) -> bytes:
        """A piece of the response's body; nothing for a HEAD request."""
        if self._bodyless:
            return b""
        if self._sends_chunks and data:
            # What h11 would write, and its state stays as it is; a chunk is sent for every token.
            return b"%x\r\n%b\r\n" % (len(data), data)
        return self._h11.send(h11.Data(data=data))

    def end(self) -> bytes:
        self._sends_chunks = False
        return self._h11.send(h11.EndOfMessage())

    @property
    def may_go_on(self) -> bool:
        """Both sides are done and neither said or implied that the connection closes."""
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE


def _too_large(limits: HttpLimits) -> RequestError:
    return RequestError(f"The body may have at most {limits.max_body_bytes} bytes.", code="request_too_large")


def _bad_body() -> RequestError:
    return RequestError("The chunked body is not valid.", code="bad_request")
