"""What two simulated engines say to each other about a transfer; every message crosses as bytes.

Nothing acts here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import xxhash

from xllm.engine.kvtransfer.base import Manifest, Slots, TransferEvent
from xllm.errors import ErrorInfo
from xllm.simulation.link import Pipe
from xllm.simulation.network import Route


class Offer(msgspec.Struct, tag="offer"):
    transfer_id: str
    num_pages: tuple[int, ...]
    compatible: str


class Ask(msgspec.Struct, tag="ask"):
    transfer_id: str
    root: bytes
    digests: tuple[bytes, ...]
    compatible: str


class Accept(msgspec.Struct, tag="accept"):
    slots: Slots


class Refuse(msgspec.Struct, tag="refuse"):
    error: ErrorInfo


class Data(msgspec.Struct, tag="data"):
    """`content` is empty where the sender has written it itself."""

    group: int
    index: int
    content: bytes
    checksum: int


class Finish(msgspec.Struct, tag="finish"):
    manifest: Manifest
    checksums: tuple[tuple[int, int, int], ...]


class Done(msgspec.Struct, tag="done"):
    pass


class Cancel(msgspec.Struct, tag="cancel"):
    pass


class Stopped(msgspec.Struct, tag="stopped"):
    """The sender's answer to Cancel: it writes no more."""


class Alive(msgspec.Struct, tag="alive"):
    pass


Message = Offer | Ask | Accept | Refuse | Data | Finish | Done | Cancel | Stopped | Alive
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def decode(data: bytes) -> Message:
    message: Message = _decoder.decode(data)
    return message


def checksum(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content)


class Party(Protocol):
    """One side of a transfer, as its connection sees it."""

    def handle(self, message: Message) -> None: ...

    def lost(self) -> None:
        """EOF: the peer closed, died, or the connection broke."""


@dataclass(slots=True, eq=False)
class End:
    """One side's view of a connection. `party` is whoever it belongs to, once that is known."""

    inbound: Pipe
    outbound: Pipe
    route: Route
    peer: str
    party: Party | None = None

    def say(self, message: Message) -> None:
        self.outbound.send(_encoder.encode(message))

    def close(self) -> None:
        self.outbound.end()


Tell = Callable[[TransferEvent], None]


def failure(code: str, message: str) -> ErrorInfo:
    return ErrorInfo(kind="UnavailableError", code=code, message=message)


SILENT = failure("transfer_timeout", "the peer of a transfer of KV pages said nothing for too long")
PEER_GONE = failure("transfer_peer_gone", "the peer of a transfer of KV pages is gone")
CANCELLED = failure("transfer_cancelled", "a transfer of KV pages was given up")
CORRUPT = failure("transfer_corrupt", "KV pages arrived with other content than was sent")
