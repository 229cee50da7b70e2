"""Bytes of a client that h11 has not seen yet: half a head, or requests sent ahead of their turn.

Only complete heads that passed the raw checks go on to h11. Knows no time.
"""

from __future__ import annotations

from xllm.api.http.head import check_head, check_start
from xllm.api.http.limits import HttpLimits
from xllm.errors import RequestError


class Inbox:
    """The buffer of one connection; true when it holds anything."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._scanned = 0
        self._may_skip_line = True

    def __bool__(self) -> bool:
        return bool(self._buffer)

    def add(self, data: bytes) -> None:
        self._buffer += data

    def add_ahead(self, data: bytes) -> bool:
        """Keep bytes that came before their turn; False, and nothing is kept, when they are too many."""
        if len(self._buffer) + len(data) > self._limits.max_pipelined_bytes:
            self.clear()
            return False
        self._buffer += data
        return True

    def clear(self) -> None:
        self._buffer.clear()
        self._scanned = 0

    def take_all(self) -> bytes:
        data = bytes(self._buffer)
        self.clear()
        return data

    def take_head(self) -> bytes | None:
        """A complete head with its empty line, or None until there is one.

        Raises RequestError (bad_request, headers_too_large), as early as the bytes allow.
        """
        buffer = self._buffer
        # RFC 9112 §2.2: an empty line after the last body. One: a row of them would never be a late head.
        if self._may_skip_line and not self._scanned and buffer[:2] == b"\r\n":
            del buffer[:2]
            self._may_skip_line = False
        seen = self._scanned
        end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
        if end >= 0:
            block = bytes(buffer[: end + 4])
            del buffer[: end + 4]
            self._scanned = 0
            self._may_skip_line = True
            check_head(block, self._limits)
            return block
        if buffer.count(b"\n", seen) != buffer.count(b"\r\n", max(0, seen - 1)):
            raise RequestError("A line does not end in CRLF.", code="bad_request")
        # Only the first line can be judged early; beyond it just the size matters.
        if buffer and (seen <= self._limits.max_target_bytes or len(buffer) > self._limits.max_head_bytes):
            check_start(bytes(buffer), self._limits)
        self._scanned = len(buffer)
        return None
