"""The data plane of a simulated engine: `Transfers` on virtual time.

What threads and sockets do elsewhere, as tasks of a virtual loop: connect, copy page by page, notice silence.
When the pages that a step writes exist is `step_transfers.py`'s business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from xllm.engine.kvtransfer.base import Asked, Failed, Manifest, Pushed, Released, Slots, TransferEvent
from xllm.engine.platform.null_runner import TokenPages
from xllm.errors import ErrorInfo
from xllm.simulation.network import Network, Route
from xllm.simulation.receiving import Incoming
from xllm.simulation.sending import Outgoing
from xllm.simulation.transfer_messages import (
    CANCELLED,
    PEER_GONE,
    SILENT,
    Alive,
    Ask,
    End,
    Message,
    Offer,
    Refuse,
    decode,
    failure,
)

NO_PROGRESS_S = 2.0
TICK_S = 0.5

UNREACHABLE = failure("transfer_unreachable", "no engine takes KV pages at the given endpoints")
INCOMPATIBLE = failure("transfer_incompatible", "the engines' KV pages have different layouts or numerics")
NOT_ASKED = failure("transfer_unknown", "nothing is kept for this transfer")

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class SimTransfers:
    """Of one process. `may_run` is cleared while it is stopped; `spawn`ed tasks end with it.

    `memory` by KV group is what pages hold; `page_bytes` what a page of each group weighs on the wire.
    """

    def __init__(
        self,
        network: Network,
        endpoint: str,
        memory: list[TokenPages],
        *,
        page_bytes: tuple[int, ...],
        compatible: str,
        tell: Callable[[TransferEvent], None],
        may_run: Callable[[], Awaitable[object]],
        spawn: Spawn,
    ) -> None:
        self.endpoint = endpoint
        self._network = network
        self._memory = memory
        self._page_bytes = page_bytes
        self._compatible = compatible
        self._tell = tell
        self._may_run = may_run
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._parties: dict[str, Outgoing | Incoming] = {}
        self._asked: dict[str, End] = {}
        self._ends: set[End] = set()
        self._watcher: asyncio.Task[None] | None = None
        network.listen(endpoint, self._called, memory)

    # -- the protocol -------------------------------------------------------------------------------

    @property
    def endpoints(self) -> tuple[str, ...]:
        return (self.endpoint,)

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        end = self._connect(transfer_id, endpoints)
        if end is not None:
            self._begin_outgoing(transfer_id, num_pages, end)

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        if isinstance(party := self._parties.get(transfer_id), Outgoing):
            party.push(pushed)

    def step_done(self) -> None:
        """Nothing here is told of pages before they are written; see `step_transfers.py`."""

    def num_pending(self, transfer_id: str) -> int | None:
        party = self._parties.get(transfer_id)
        return party.num_pending if isinstance(party, Outgoing) else None

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        if isinstance(party := self._parties.get(transfer_id), Outgoing):
            party.finish(manifest)

    def accept(self, transfer_id: str, slots: Slots) -> None:
        if isinstance(party := self._parties.get(transfer_id), Incoming):
            party.accept(slots)

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        end = self._asked.pop(transfer_id, None)
        if end is not None:
            end.say(Refuse(error))
            end.close()
        elif isinstance(party := self._parties.get(transfer_id), Incoming):
            party.refuse(error)

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        end = self._connect(transfer_id, endpoints)
        if end is not None:
            self._begin_incoming(transfer_id, end)
            end.say(Ask(transfer_id, root, digests, self._compatible))

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        end = self._asked.pop(transfer_id, None)
        if end is None:
            self._told_in_vain(transfer_id, NOT_ASKED)
            return
        # Indices name places in the list of all that is offered, holes included.
        num_pages = tuple(max(group, default=-1) + 1 for group in pushed.indices)
        party = self._begin_outgoing(transfer_id, num_pages, end)
        party.push(pushed)
        party.finish(manifest)

    def cancel(self, transfer_id: str) -> None:
        end = self._asked.pop(transfer_id, None)
        if end is not None:
            end.say(Refuse(CANCELLED))
            end.close()
        elif (party := self._parties.get(transfer_id)) is not None:
            party.give_up(CANCELLED)

    def close(self) -> None:
        """The process ends, in whatever way: its connections do, and nobody can connect."""
        self._network.gone(self.endpoint)
        for end in self._ends:
            end.outbound.end()
            end.inbound.cut()

    # -- connections ----------------------------------------------------------------------------------

    def _connect(self, transfer_id: str, endpoints: tuple[str, ...]) -> End | None:
        if transfer_id not in self._parties:
            for endpoint in endpoints:
                route = self._network.connect(self.endpoint, endpoint)
                if route is not None:
                    end = End(route.to_caller, route.to_answerer, route, endpoint)
                    self._open(end)
                    return end
        self._told_in_vain(transfer_id, UNREACHABLE)
        return None

    def _called(self, route: Route) -> None:
        self._open(End(route.to_answerer, route.to_caller, route, route.caller))

    def _open(self, end: End) -> None:
        self._ends.add(end)
        self._spawn(self._read(end), f"transfers of {self.endpoint}")

    async def _read(self, end: End) -> None:
        while True:
            data = await end.inbound.receive()
            await self._may_run()
            if data is None:
                break
            message = decode(data)
            if end.party is not None:
                end.party.handle(message)
            else:
                self._first(end, message)
        self._ends.discard(end)
        end.close()
        if end.party is not None:
            end.party.lost()
        for transfer_id in [t for t, asked in self._asked.items() if asked is end]:
            del self._asked[transfer_id]

    def _first(self, end: End, message: Message) -> None:
        """What a caller wants."""
        if not isinstance(message, Offer | Ask):
            return
        known = message.transfer_id in self._parties or message.transfer_id in self._asked
        if known or message.compatible != self._compatible:
            end.say(Refuse(PEER_GONE if known else INCOMPATIBLE))
            end.close()
        elif isinstance(message, Offer):
            self._begin_incoming(message.transfer_id, end).handle(message)
        else:
            self._asked[message.transfer_id] = end
            self._tell(Asked(transfer_id=message.transfer_id, root=message.root, digests=message.digests))

    def _told_in_vain(self, transfer_id: str, error: ErrorInfo) -> None:
        self._tell(Failed(transfer_id=transfer_id, error=error))
        self._tell(Released(transfer_id=transfer_id))

    # -- transfers --------------------------------------------------------------------------------------

    def _begin_outgoing(self, transfer_id: str, num_pages: tuple[int, ...], end: End) -> Outgoing:
        party = Outgoing(
            transfer_id,
            num_pages,
            end,
            self._network,
            self._memory,
            page_bytes=self._page_bytes,
            tell=self._hear,
            may_run=self._may_run,
        )
        self._parties[transfer_id] = end.party = party
        end.say(Offer(transfer_id, num_pages, self._compatible))
        self._spawn(party.copy(), f"copies of {transfer_id}")
        self._watch()
        return party

    def _begin_incoming(self, transfer_id: str, end: End) -> Incoming:
        one_sided = self._network.wire.one_sided
        party = Incoming(
            transfer_id, end, self._memory, one_sided=one_sided, tell=self._hear, now_s=self._loop.time
        )
        self._parties[transfer_id] = end.party = party
        self._watch()
        return party

    def _hear(self, event: TransferEvent) -> None:
        if isinstance(event, Released):
            self._parties.pop(event.transfer_id, None)
        self._tell(event)

    # -- limits --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._watcher is None or self._watcher.done():
            self._watcher = self._spawn(self._look_for_silence(), f"watch of {self.endpoint}")

    async def _look_for_silence(self) -> None:
        while self._parties:
            slept_s = self._loop.time()
            await asyncio.sleep(TICK_S)
            await self._may_run()
            now_s = self._loop.time()
            if now_s - slept_s > 2 * TICK_S:
                continue  # this process stood still: what its peers said meanwhile is read first
            for party in list(self._parties.values()):
                self._look_at(party, now_s)

    def _look_at(self, party: Outgoing | Incoming, now_s: float) -> None:
        party.end.say(Alive())
        since_s = party.heard_s
        if isinstance(party, Outgoing) and party.waits_for_peer:
            since_s = min(since_s, party.progress_s)
        if now_s - since_s >= NO_PROGRESS_S:
            party.give_up(SILENT)
