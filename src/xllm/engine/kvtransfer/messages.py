"""What two engines say to each other about KV pages, and the frames it travels in.

Every frame carries checksums of its head and its payload: a flipped bit in a slot number or a token must not
pass for another one. Only these messages are decoded, never an object; meaning is checked by who acts on it.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec
import xxhash

from xllm.errors import ErrorInfo, RequestError

MAX_ID_CHARS = 128
MAX_HEAD_BYTES = 32 << 20
"""A manifest of eight long sequences; far more than any of ours."""
MAX_PAYLOAD_BYTES = 8 << 20

FRAME = struct.Struct("<IIQQ")
"""Length of the head, length of the payload, XXH3 of the head (seeded with both lengths), of the payload."""

Way = Literal["shm", "stream", "mooncake"]
"""How bytes come into the receiver's pages: the sender writes into its file; as Data; through mooncake."""


class BadFrameError(RequestError):
    """The connection carries something else than this protocol, or damaged; it must be ended."""

    default_code = "kv_garbage"


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """Sender → receiver: so many pages per group of this kind. Answered by Accept or Refuse."""

    transfer_id: str
    num_pages: tuple[int, ...]
    page_bytes: tuple[int, ...]
    page_size: int
    numerics_class: str
    layout_digest: str


class Accept(msgspec.Struct, frozen=True, kw_only=True, tag="accept", omit_defaults=True):
    """Receiver → sender: `slots[g][i]` of its pool are leased for the sender's i-th page of g.

    `window` describes the receiver's file (offset, number of pages) by group, whose descriptor comes once
    on a connection, with `has_fd`. `session` and `bases` name its memory to mooncake.
    """

    transfer_id: str
    slots: tuple[tuple[int, ...], ...]
    way: Way
    window: tuple[tuple[int, int], ...] = ()
    has_fd: bool = False
    session: str = ""
    bases: tuple[int, ...] = ()


class Refuse(msgspec.Struct, frozen=True, kw_only=True, tag="refuse"):
    """No to an Offer or an Ask."""

    transfer_id: str
    error: ErrorInfo


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """Receiver → sender: offer me what you keep under this id, or cached pages of a prefix."""

    transfer_id: str
    root: bytes = b""
    digests: tuple[bytes, ...] = ()


class Data(msgspec.Struct, frozen=True, kw_only=True, tag="data"):
    """Sender → receiver: bytes [offset, offset + length) of the pages with these indices, one behind the
    other in the payload. Sending it again does no harm."""

    transfer_id: str
    group: int
    indices: tuple[int, ...]
    offset: int
    length: int


class Passed(msgspec.Struct, frozen=True, kw_only=True, tag="passed"):
    """Sender → receiver: this layer (of the group's) of these pages is written; its digest may be begun."""

    transfer_id: str
    group: int
    indices: tuple[int, ...]
    layer: int


class Wrote(msgspec.Struct, frozen=True, kw_only=True, tag="wrote"):
    """Sender → receiver: these pages are whole as far as I know; checking need not wait for the end."""

    transfer_id: str
    group: int
    indices: tuple[int, ...]
    digests: tuple[int, ...]


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """Sender → receiver: nothing follows. `digests[g]` = (index, XXH3 of the page) of all that was sent;
    `manifest` is an encoded `base.Manifest`."""

    transfer_id: str
    digests: tuple[tuple[tuple[int, int], ...], ...]
    manifest: bytes
    num_bytes: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Receiver → sender: all of it is here and right."""

    transfer_id: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Either way: given up. From a sender it also says that nothing is written any more."""

    transfer_id: str
    error: ErrorInfo


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="ack"):
    """Sender → receiver, after a Cancel: I do not write to your pages any more."""

    transfer_id: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """While a transfer is under way: I am here, and still sending these."""

    sending: tuple[str, ...] = ()


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """Answer to a Ping, at once."""


Message = Offer | Accept | Refuse | Ask | Data | Passed | Wrote | Finish | Done | Cancel | Ack | Ping | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def checksum(data: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def frame(head: bytes, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """The bytes that precede the payload on the wire."""
    size = len(payload)
    return FRAME.pack(len(head), size, _head_digest(head, size), checksum(payload) if size else 0) + head


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(head: bytes) -> Message:
    """Raises BadFrameError."""
    try:
        message = _decoder.decode(head)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrameError("not a message about KV pages") from error
    if not isinstance(message, Ping | Pong) and not 0 < len(message.transfer_id) <= MAX_ID_CHARS:
        raise BadFrameError("a transfer without a usable id")
    return message


def check_head(head: bytes, payload_bytes: int, digest: int) -> None:
    """Raises BadFrameError for a head that is not as it was sent."""
    if _head_digest(head, payload_bytes) != digest:
        raise BadFrameError("a damaged frame", code="kv_damaged")


def _head_digest(head: bytes, payload_bytes: int) -> int:
    return xxhash.xxh3_64_intdigest(head, seed=(len(head) << 32) | payload_bytes)
