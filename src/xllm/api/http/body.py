"""Where a request body ends: by length or by chunks. Decoders fed with whatever arrives.

They never hold more than one chunk line; the caller owns the bytes and their limit.
"""

from __future__ import annotations

import re
from typing import Protocol

from xllm.errors import RequestError

# Nine hex digits are 64 GiB; any more could only be an attack on somebody's integers.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,9})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_MAX_CHUNK_LINE = 256


class BodyDecoder(Protocol):
    done: bool

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """(body bytes, bytes that belong to what follows). Raises RequestError(bad_request)."""


class LengthBody:
    """Exactly `length` bytes."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        body, rest = data[: self._left], data[self._left :]
        self._left -= len(body)
        self.done = self._left == 0
        return body, rest


class ChunkedBody:
    """Chunks; extensions are skipped, trailers are refused (nobody here would read them)."""

    def __init__(self) -> None:
        self._pending = b""
        self._left = 0
        self._state = "line"
        self.done = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        data = self._pending + data
        out = []
        at = 0
        while not self.done:
            if self._state == "data":
                part = data[at : at + self._left]
                out.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left:
                    break
                self._state = "end"
            elif self._state == "line":
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._check_partial_line(data[at:])
                    break
                self._read_line(data[at:end])
                at = end + 2
            elif len(data) - at < 2:
                if data[at : at + 1] not in (b"", b"\r"):
                    raise _bad_chunk()
                break
            elif data[at : at + 2] != b"\r\n":
                raise _bad_chunk()
            else:
                at += 2
                self.done = self._state == "last"
                self._state = "line"
        self._pending = b"" if self.done else data[at:]
        return b"".join(out), data[at:] if self.done else b""

    def _read_line(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line) if len(line) <= _MAX_CHUNK_LINE else None
        if match is None:
            raise _bad_chunk()
        self._left = int(match[1], 16)
        self._state = "data" if self._left else "last"

    @staticmethod
    def _check_partial_line(line: bytes) -> None:
        if len(line) > _MAX_CHUNK_LINE or not _CHUNK_LINE.fullmatch(line.removesuffix(b"\r") or b"0"):
            raise _bad_chunk()


def _bad_chunk() -> RequestError:
    return RequestError("The chunked body is not valid.", code="bad_request")
