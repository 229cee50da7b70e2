"""Frames on a byte stream: 4-byte little-endian length, then one msgpack message.

The length is checked before anything is read or allocated. A message whose tag nobody here knows is told
apart from garbage, since a newer peer may send it. No pickle, no addresses, no retries.
"""

from __future__ import annotations

import struct
from types import UnionType
from typing import get_args

import msgspec

from xllm.errors import RequestError
from xllm.wire.messages import EngineMessage, FrontMessage

MAX_FRAME_BYTES = 64 * 1024 * 1024
HEADER = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
# The aliases are unions, which the stub's type parameter cannot express.
_front: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
_engine: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


class WireError(RequestError):
    """The peer sent something that is not the protocol; the connection must be closed."""

    default_code = "wire_error"


class UnknownMessageError(WireError):
    """A whole message with a tag that this version does not know: to be skipped and counted."""

    default_code = "unknown_message"


class _Tag(msgspec.Struct):
    """What every message has."""

    type: str


_tag: msgspec.msgpack.Decoder[_Tag] = msgspec.msgpack.Decoder(_Tag)


def _tags(union: UnionType) -> frozenset[str]:
    return frozenset(arm.__struct_config__.tag for arm in get_args(union))


_FRONT_TAGS = _tags(FrontMessage)
_ENGINE_TAGS = _tags(EngineMessage)


def encode(message: FrontMessage | EngineMessage) -> bytes:
    """The message as one frame, header included."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def body_length(header: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """The length a frame header announces, refused when it is beyond `max_bytes`."""
    (length,) = HEADER.unpack(header)
    if length > max_bytes:
        raise WireError(f"frame of {length} bytes exceeds {max_bytes}")
    return int(length)


def decode_front(body: bytes) -> FrontMessage:
    """A message that a front sent. Raises WireError, or UnknownMessageError for a tag of another version."""
    try:
        return _front.decode(body)
    except _GARBAGE as error:
        raise _failure(body, _FRONT_TAGS) from error


def decode_engine(body: bytes) -> EngineMessage:
    """A message that an engine sent. Raises as `decode_front`."""
    try:
        return _engine.decode(body)
    except _GARBAGE as error:
        raise _failure(body, _ENGINE_TAGS) from error


_GARBAGE = (msgspec.DecodeError, ValueError, RecursionError)


def _failure(body: bytes, known: frozenset[str]) -> WireError:
    try:
        tag = _tag.decode(body).type
    except _GARBAGE:
        return WireError("not a message")
    if tag in known:
        return WireError(f"a broken {tag} message")
    return UnknownMessageError("a message that this version does not know")


class FrameSplitter:
    """Cuts a growing byte buffer into frame bodies; for readers that get arbitrary pieces.

    `max_bytes` may change between two calls of `feed`; it holds for the next frame that begins.
    """

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def has_partial(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies completed by `data`, in order."""
        self._buffer += data
        bodies: list[bytes] = []
        while (body := self.take()) is not None:
            bodies.append(body)
        return bodies

    def put(self, data: bytes) -> None:
        """Append; for readers that `take` bodies one by one, since one may change what the next may be."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next complete body."""
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + body_length(bytes(self._buffer[: HEADER.size]), self.max_bytes)
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return body
