"""Frames on a byte stream: 4-byte little-endian length, then one msgpack message.

The length is checked before anything is read or allocated. No pickle, no addresses, no retries.
"""

from __future__ import annotations

import struct

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


def encode(message: FrontMessage | EngineMessage) -> bytes:
    """The message as one frame, header included."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """The length a frame header announces, refused when it is beyond MAX_FRAME_BYTES."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return int(length)


def decode_front(body: bytes) -> FrontMessage:
    """A message that a front sent. Raises WireError."""
    try:
        return _front.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError("not a front message") from error


def decode_engine(body: bytes) -> EngineMessage:
    """A message that an engine sent. Raises WireError."""
    try:
        return _engine.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError("not an engine message") from error


class FrameSplitter:
    """Cuts a growing byte buffer into frame bodies; for readers that get arbitrary pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies completed by `data`, in order."""
        self._buffer += data
        bodies: list[bytes] = []
        while len(self._buffer) >= HEADER.size:
            length = body_length(bytes(self._buffer[: HEADER.size]))
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
        return bodies
