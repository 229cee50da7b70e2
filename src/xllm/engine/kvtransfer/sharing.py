"""What both sides of transfers need of their engine: its pages, their kind, time, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm.engine.kvtransfer.base import Failed, Released, TransferEvent
from xllm.engine.kvtransfer.connection import Connection
from xllm.engine.kvtransfer.counters import TransferCounters
from xllm.engine.kvtransfer.endpoints import parse_endpoint
from xllm.engine.kvtransfer.links import Links, TransferLimits
from xllm.engine.kvtransfer.memory import KVMemory
from xllm.engine.kvtransfer.messages import Way
from xllm.engine.kvtransfer.mooncake import Mooncake
from xllm.errors import UnavailableError, XllmError


@dataclass(frozen=True, slots=True, kw_only=True)
class PageKind:
    """Peers exchange pages only if all of it is equal."""

    numerics_class: str
    layout_digest: str
    page_size: int


@dataclass(slots=True, kw_only=True)
class Shared:
    memory: KVMemory
    kind: PageKind
    limits: TransferLimits
    counters: TransferCounters
    now: Callable[[], float]
    tell: Callable[[TransferEvent], None]
    post: Callable[[Callable[[], None]], None]
    """Run on the I/O thread, soon; from any thread."""
    here: str
    """The boot id of this machine."""
    mooncake: Mooncake | None = None

    def connect(self, links: Links, endpoint: str) -> Connection | None:
        parsed = parse_endpoint(endpoint, self.here)
        if parsed is None or (parsed.road == "mooncake" and self.mooncake is None):
            return None
        return links.open(parsed)

    def way_into(self, connection: Connection) -> Way:
        """How a peer at the other end is to bring pages to us."""
        if connection.road == "unix" and self.memory.fd is not None:
            return "shm"
        if connection.road == "mooncake" and self.mooncake is not None:
            return "mooncake"
        return "stream"

    def tell_failed(self, transfer_id: str, error: XllmError) -> None:
        self.counters.failed[error.code] += 1
        self.tell(Failed(transfer_id=transfer_id, error=error.info()))

    def tell_released(self, transfer_id: str) -> None:
        self.tell(Released(transfer_id=transfer_id))


def no_answer() -> UnavailableError:
    return UnavailableError("the peer has said nothing for too long", code="transfer_timeout")


def cancelled() -> UnavailableError:
    return UnavailableError("the transfer was cancelled", code="transfer_cancelled")


def not_reached() -> UnavailableError:
    return UnavailableError("no endpoint of the peer can be reached", code="transfer_unreachable")


def corrupt() -> UnavailableError:
    return UnavailableError("pages did not arrive as they were sent", code="transfer_corrupt")
