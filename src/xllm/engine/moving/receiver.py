"""The receiving side: leases pages, keeps what arrived until its request comes, and lets that go on from it.

A request whose pages are on their way is held for a bounded time; then, and whenever a transfer fails, it is
computed like any other. Pages that a peer may still write are not reused before Released.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from xllm.engine.kvtransfer.base import Arrived, Manifest, Offered, Slots, Transfers
from xllm.engine.memory.leases import Leases
from xllm.engine.moving.counters import MoveCounters
from xllm.engine.request import Request
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.errors import ErrorInfo
from xllm.wire.messages import Fetch

UNCLAIMED_S = 10.0
"""What has arrived waits so long for its request."""
MAX_WAIT_S = 5.0
"""A request waits so long for its pages; computing them takes about as long at most."""
MAX_INCOMING = 256


class State(enum.Enum):
    ASKED = "asked"
    """We pull; the peer has not offered yet."""
    LEASED = "leased"
    ARRIVED = "arrived"
    FAILED = "failed"
    """Over; the pages may still be written until the transfers let go."""


@dataclass(slots=True)
class Incoming:
    """Written by `Receiver` only. `request` waits for it; `manifest` is set once it arrived."""

    transfer_id: str
    state: State
    slots: Slots = ()
    manifest: Manifest | None = None
    request: Request | None = None
    until_s: float = 0.0
    """When the request stops waiting, or what arrived is thrown away."""


class Receiver:
    """Owns the leases of this engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        leases: Leases,
        transfers: Transfers,
        counters: MoveCounters,
        settle: Callable[[], None],
    ) -> None:
        """`settle` carries out the page copies that are due."""
        self._scheduler = scheduler
        self._leases = leases
        self._transfers = transfers
        self._counters = counters
        self._settle = settle
        self._incoming: dict[str, Incoming] = {}
        self.draining = False

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._incoming

    def __len__(self) -> int:
        return len(self._incoming)

    # -- from the front -------------------------------------------------------------------------

    def fetch(self, message: Fetch) -> None:
        """Pull a cached prefix; the Submit that names it waits for it. A fetch that cannot be begun is
        none: the request is computed."""
        if message.transfer_id and self._has_room(message.transfer_id) and message.digests:
            self._incoming[message.transfer_id] = Incoming(message.transfer_id, State.ASKED)
            self._transfers.pull(
                message.transfer_id, message.sources, root=message.root, digests=message.digests
            )

    def submitted(self, request: Request, transfer_id: str, sources: tuple[str, ...], now_s: float) -> None:
        """The request's KV comes, or has come, under this name."""
        incoming = self._incoming.get(transfer_id)
        if incoming is None:
            if not sources or not self._has_room(transfer_id):
                return
            incoming = self._incoming[transfer_id] = Incoming(transfer_id, State.ASKED)
            self._transfers.pull(transfer_id, sources)
        if incoming.state is State.FAILED or incoming.request is not None:
            return
        incoming.request = request
        if incoming.state is State.ARRIVED:
            self._claim(incoming, request)
        else:
            self._scheduler.hold(request)
            incoming.until_s = now_s + MAX_WAIT_S

    def cancel(self, transfer_id: str) -> None:
        incoming = self._incoming.get(transfer_id)
        if incoming is not None:
            self._give_up(incoming)

    # -- from the transfers ---------------------------------------------------------------------

    def offered(self, event: Offered) -> None:
        incoming = self._incoming.get(event.transfer_id)
        if incoming is None:
            if self.draining:
                self._transfers.refuse(event.transfer_id, _DRAINING)
                return
            if not self._has_room(event.transfer_id):
                self._transfers.refuse(event.transfer_id, _NO_ROOM)
                return
            incoming = Incoming(event.transfer_id, State.ASKED)
        elif incoming.state is not State.ASKED:
            self._transfers.refuse(event.transfer_id, _TWICE)
            return
        self._settle()
        # Each running sequence may need a page in its next step; it shall not be preempted for a newcomer.
        slots = self._leases.lease(event.num_pages, self._scheduler.num_running)
        if slots is None:
            self._transfers.refuse(event.transfer_id, _NO_ROOM)
            if event.transfer_id in self._incoming:
                self._give_up(incoming)
            return
        incoming.slots, incoming.state = slots, State.LEASED
        self._incoming[event.transfer_id] = incoming
        self._transfers.accept(event.transfer_id, slots)

    def arrived(self, event: Arrived, now_s: float) -> None:
        incoming = self._incoming.get(event.transfer_id)
        if incoming is None or incoming.state is not State.LEASED:
            return
        self._counters.received_bytes += event.num_bytes
        incoming.state, incoming.manifest = State.ARRIVED, event.manifest
        if incoming.request is not None:
            self._claim(incoming, incoming.request)
        else:
            incoming.until_s = now_s + UNCLAIMED_S

    def failed(self, transfer_id: str) -> None:
        incoming = self._incoming.get(transfer_id)
        if incoming is not None and incoming.state in (State.ASKED, State.LEASED):
            self._counters.num_failed += 1
            incoming.state = State.FAILED
            self._let_compute(incoming)

    def released(self, transfer_id: str) -> None:
        incoming = self._incoming.get(transfer_id)
        if incoming is None or incoming.state is State.ARRIVED:
            return  # what arrived is ours from then on
        self._let_compute(incoming)
        self._drop(incoming)

    def tick(self, now_s: float) -> None:
        for incoming in tuple(self._incoming.values()):
            request = incoming.request
            if incoming.state is State.ARRIVED:
                if now_s >= incoming.until_s:
                    self._drop(incoming)
            elif (
                request is not None
                and incoming.state is not State.FAILED
                and (request.ended or now_s >= incoming.until_s)
            ):
                self._counters.num_failed += 1
                self._give_up(incoming)

    # -- ends -------------------------------------------------------------------------------------

    def _claim(self, incoming: Incoming, request: Request) -> None:
        if incoming.manifest is not None and not request.ended:
            self._settle()
            num_rows = self._scheduler.claim(request, incoming.manifest, incoming.slots)
            self._counters.num_in += num_rows > 0
            self._counters.claimed_rows += num_rows
        self._let_compute(incoming)
        self._drop(incoming)

    def _give_up(self, incoming: Incoming) -> None:
        self._let_compute(incoming)
        if incoming.state is State.ARRIVED:
            self._drop(incoming)
        elif incoming.state is not State.FAILED:
            incoming.state = State.FAILED
            self._transfers.cancel(incoming.transfer_id)

    def _let_compute(self, incoming: Incoming) -> None:
        """The request, if one waits, waits no longer."""
        request, incoming.request = incoming.request, None
        if request is not None and not request.ended:
            self._scheduler.hold(request, False)

    def _drop(self, incoming: Incoming) -> None:
        del self._incoming[incoming.transfer_id]
        if incoming.slots:
            self._leases.let_go(incoming.slots)

    def _has_room(self, transfer_id: str) -> bool:
        return transfer_id not in self._incoming and len(self._incoming) < MAX_INCOMING


def _error(code: str, message: str) -> ErrorInfo:
    return ErrorInfo(kind="UnavailableError", code=code, message=message)


_DRAINING = _error("draining", "this engine is draining and takes nothing over")
_NO_ROOM = _error("no_room", "this engine has not enough free pages now")
_TWICE = _error("duplicate_transfer", "a transfer of this id is known already")
