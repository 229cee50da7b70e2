"""All transfers that come to this engine, and all that it asked for. On the I/O thread only.

What may be written into a lease stands in `incoming`; leases themselves belong to the step thread, which has
them back with Released.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from xllm.engine.kvtransfer.base import Arrived, Asked, Offered, Slots
from xllm.engine.kvtransfer.connection import Arrival, Connection
from xllm.engine.kvtransfer.incoming import Incoming, Phase, refused
from xllm.engine.kvtransfer.links import Links
from xllm.engine.kvtransfer.messages import (
    Accept,
    Ask,
    Cancel,
    Data,
    Done,
    Finish,
    Offer,
    Passed,
    Refuse,
    Wrote,
)
from xllm.engine.kvtransfer.sharing import Shared, cancelled, corrupt, no_answer, not_reached
from xllm.errors import ConfigError, RequestError, UnavailableError, XllmError

_REMEMBERED = 4096
"""Ids of transfers that have ended, so that a repeated Offer does not begin them again."""


@dataclass(slots=True, eq=False)
class _Pull:
    """Asked of a peer, not offered yet."""

    ask: Ask
    endpoints: deque[str]
    since_s: float
    connection: Connection | None = None
    failure: XllmError | None = None


@dataclass(slots=True)
class _Ended:
    """The last few ids."""

    order: deque[str] = field(default_factory=deque)
    ids: set[str] = field(default_factory=set)

    def add(self, transfer_id: str) -> None:
        if transfer_id not in self.ids:
            self.ids.add(transfer_id)
            self.order.append(transfer_id)
            if len(self.order) > _REMEMBERED:
                self.ids.discard(self.order.popleft())


class Receivers:
    def __init__(self, shared: Shared, links: Links) -> None:
        self._shared, self._links = shared, links
        self.by_id: dict[str, Incoming] = {}
        self.pulls: dict[str, _Pull] = {}
        self._asked: dict[str, Connection] = {}
        self._settling: list[tuple[float, str]] = []
        self._ended = _Ended()

    # -- the step thread's calls ---------------------------------------------------------------------

    def pull(self, ask: Ask, endpoints: tuple[str, ...]) -> None:
        if ask.transfer_id not in self.pulls and ask.transfer_id not in self.by_id:
            pull = _Pull(ask, deque(endpoints), self._shared.now())
            self.pulls[ask.transfer_id] = pull
            self._seek(pull)

    def accept(self, transfer_id: str, slots: Slots) -> None:
        entry = self.by_id.get(transfer_id)
        if entry is None or entry.phase is not Phase.OFFERED:
            return  # it has failed meanwhile; its Released frees the pages
        connection, shared = entry.connection, self._shared
        try:
            entry.lease(slots, shared.way_into(connection))
        except RequestError as error:
            connection.send(Refuse(transfer_id=transfer_id, error=error.info()))
            self._fail_at_once(entry, error)
            return
        entry.mentioned_s = shared.now()
        answer = Accept(transfer_id=transfer_id, slots=slots, way=entry.way)
        fd = None
        if entry.way == "shm" and not connection.fd_told:
            fd, connection.fd_told = shared.memory.fd, True
            window = tuple((g.file_offset, g.num_pages) for g in shared.memory.groups)
            answer = msgspec.structs.replace(answer, window=window, has_fd=True)
        elif entry.way == "mooncake" and shared.mooncake is not None:
            session, bases = shared.mooncake.session, shared.mooncake.bases
            answer = msgspec.structs.replace(answer, session=session, bases=bases)
        connection.send(answer, fd=fd)

    def refuse(self, transfer_id: str, error: XllmError) -> None:
        entry = self.by_id.get(transfer_id)
        connection = self._asked.pop(transfer_id, None)
        if entry is not None and entry.phase is Phase.OFFERED:
            del self.by_id[transfer_id]
            connection = entry.connection
        if connection is not None:
            connection.send(Refuse(transfer_id=transfer_id, error=error.info()))

    def asked_by(self, transfer_id: str) -> Connection | None:
        """Who waits for it; it is given once."""
        return self._asked.pop(transfer_id, None)

    def cancel(self, transfer_id: str) -> bool:
        if self.pulls.pop(transfer_id, None) is not None or self._asked.pop(transfer_id, None) is not None:
            self._shared.tell_released(transfer_id)
            return True
        entry = self.by_id.get(transfer_id)
        if entry is None or entry.phase is Phase.GIVEN_UP:
            return entry is not None or any(transfer_id == settling for _, settling in self._settling)
        self._give_up(entry, cancelled())
        return True

    # -- what peers say ------------------------------------------------------------------------------

    def offered(self, connection: Connection, offer: Offer) -> None:
        transfer_id = offer.transfer_id
        if transfer_id in self.by_id:
            raise refused("an offer of what is under way")
        error = self._why_not(offer)
        pull = self.pulls.get(transfer_id)
        if pull is not None and pull.connection is not connection:
            error = refused("offered by another one than was asked")
        if error is not None:
            connection.send(Refuse(transfer_id=transfer_id, error=error.info()))
            if pull is not None and pull.connection is connection:
                self._fail_pull(pull, error)
            return
        self.pulls.pop(transfer_id, None)
        self.by_id[transfer_id] = Incoming(
            transfer_id, self._shared.memory, offer.num_pages, connection, mentioned_s=self._shared.now()
        )
        self._shared.tell(Offered(transfer_id=transfer_id, num_pages=offer.num_pages))

    def asked(self, connection: Connection, ask: Ask) -> None:
        if ask.transfer_id in self._asked:
            raise refused("asked for twice")
        self._asked[ask.transfer_id] = connection
        self._shared.tell(Asked(transfer_id=ask.transfer_id, root=ask.root, digests=ask.digests))

    def data(self, connection: Connection, arrival: Arrival, data: Data) -> None:
        entry = self._leased(connection, data.transfer_id)
        if arrival.payload is None:
            self._shared.counters.corrupt += 1
            self._fail(entry, corrupt())
            return
        entry.take(data, arrival.payload)

    def passed(self, connection: Connection, passed: Passed) -> None:
        self._leased(connection, passed.transfer_id).passed(passed)

    def wrote(self, connection: Connection, wrote: Wrote) -> None:
        self._leased(connection, wrote.transfer_id).look(wrote)

    def finished(self, connection: Connection, finish: Finish) -> None:
        entry = self._leased(connection, finish.transfer_id)
        try:
            entry.end(finish)
        except RequestError as error:
            self._fail(entry, error)
            raise
        entry.check_until_s = self._shared.now() + self._shared.limits.check_s
        self._check(entry)

    def cancelled(self, connection: Connection, transfer_id: str, error: XllmError) -> bool:
        """The sender gives up; it has stopped writing."""
        entry = self._of(connection, transfer_id)
        if entry is None:
            return False
        if entry.phase is not Phase.GIVEN_UP:
            self._shared.tell_failed(transfer_id, error)
        self._release(entry)
        return True

    def acked(self, connection: Connection, transfer_id: str) -> None:
        entry = self._of(connection, transfer_id)
        if entry is not None and entry.phase is Phase.GIVEN_UP:
            self._release(entry)

    def refused(self, connection: Connection, transfer_id: str, error: XllmError) -> bool:
        pull = self.pulls.get(transfer_id)
        if pull is None or pull.connection is not connection:
            return False
        self._fail_pull(pull, error)
        return True

    def mentioned(self, connection: Connection, transfer_ids: tuple[str, ...]) -> None:
        now_s = self._shared.now()
        for transfer_id in transfer_ids:
            entry = self._of(connection, transfer_id)
            if entry is not None:
                entry.mentioned_s = now_s

    # -- what links and time say ---------------------------------------------------------------------

    def ready(self, connection: Connection) -> None:
        for pull in self.pulls.values():
            if pull.connection is connection:
                connection.send(pull.ask)

    def silent(self, connection: Connection) -> None:
        for entry in self._on(connection):
            if entry.phase is not Phase.GIVEN_UP:
                self._fail(entry, no_answer())
        for pull in [p for p in self.pulls.values() if p.connection is connection]:
            self._fail_pull(pull, no_answer())

    def gone(self, connection: Connection, error: XllmError) -> None:
        """Its process writes no more: its mappings end before its sockets do, and so does a closing peer."""
        for entry in self._on(connection):
            if entry.phase is not Phase.GIVEN_UP:
                self._shared.counters.corrupt += error.code == "transfer_corrupt"
                self._shared.tell_failed(entry.transfer_id, error)
            if entry.way == "mooncake" and entry.one_sided:
                self._ended.add(entry.transfer_id)
                del self.by_id[entry.transfer_id]
                self._settling.append((self._shared.now() + self._shared.limits.settle_s, entry.transfer_id))
            else:
                self._release(entry)
        for pull in [p for p in self.pulls.values() if p.connection is connection]:
            pull.failure, pull.connection = error, None
            self._seek(pull)
        for transfer_id in [t for t, c in self._asked.items() if c is connection]:
            del self._asked[transfer_id]

    def tick(self, now_s: float) -> None:
        limits = self._shared.limits
        for transfer_id in [t for due_s, t in self._settling if due_s <= now_s]:
            self._shared.tell_released(transfer_id)
        self._settling = [entry for entry in self._settling if entry[0] > now_s]
        for entry in list(self.by_id.values()):
            if entry.phase is Phase.LEASED and now_s - entry.mentioned_s > limits.lease_s:
                self._fail(entry, _expired())
        for pull in list(self.pulls.values()):
            if now_s - pull.since_s > limits.answer_s:
                self._fail_pull(pull, no_answer())

    @property
    def is_checking(self) -> bool:
        return any(e.phase is Phase.CHECKING for e in self.by_id.values())

    @property
    def is_settling(self) -> bool:
        return bool(self._settling)

    def check(self) -> None:
        for entry in [e for e in self.by_id.values() if e.phase is Phase.CHECKING]:
            self._check(entry)

    # -- parts ---------------------------------------------------------------------------------------

    def _check(self, entry: Incoming) -> None:
        if entry.wrong_pages():
            # Mooncake says that it has written before its receiver has.
            if entry.way != "mooncake" or self._shared.now() > entry.check_until_s:
                self._shared.counters.corrupt += 1
                self._fail(entry, corrupt())
            return
        if entry.manifest is None or entry.finish is None:
            return
        counters = self._shared.counters
        counters.num_arrived += 1
        counters.bytes_arrived += entry.finish.num_bytes
        del self.by_id[entry.transfer_id]
        self._ended.add(entry.transfer_id)
        self._shared.tell(
            Arrived(transfer_id=entry.transfer_id, manifest=entry.manifest, num_bytes=entry.finish.num_bytes)
        )
        entry.connection.send(Done(transfer_id=entry.transfer_id))

    def _why_not(self, offer: Offer) -> XllmError | None:
        """By name, for the peer's log and its front."""
        kind, memory = self._shared.kind, self._shared.memory
        if offer.transfer_id in self._ended.ids:
            return refused("this transfer has ended already", "transfer_known")
        if offer.numerics_class != kind.numerics_class:
            return ConfigError(
                "the engines are of different numerics classes; give both the same model, dtype and kernels",
                code="transfer_class",
            )
        same = offer.layout_digest == kind.layout_digest and offer.page_size == kind.page_size
        if not same or offer.page_bytes != memory.page_bytes:
            return ConfigError(
                "the engines keep KV pages in different layouts; give both the same kv_cache_dtype",
                code="transfer_layout",
            )
        fits = len(offer.num_pages) == len(memory.groups) and all(
            0 <= n <= g.num_pages for n, g in zip(offer.num_pages, memory.groups, strict=True)
        )
        return None if fits else UnavailableError("more pages than there are", code="transfer_no_room")

    def _fail(self, entry: Incoming, error: XllmError) -> None:
        self._shared.tell_failed(entry.transfer_id, error)
        self._give_up(entry, error)

    def _fail_at_once(self, entry: Incoming, error: XllmError) -> None:
        """The sender has not been let in."""
        self._shared.tell_failed(entry.transfer_id, error)
        self._release(entry)

    def _give_up(self, entry: Incoming, error: XllmError) -> None:
        """Tell the sender. Where it writes by itself, pages are kept until it has stopped."""
        entry.connection.send(Cancel(transfer_id=entry.transfer_id, error=error.info()))
        if entry.one_sided:
            entry.phase = Phase.GIVEN_UP
        else:
            self._release(entry)

    def _release(self, entry: Incoming) -> None:
        self._ended.add(entry.transfer_id)
        del self.by_id[entry.transfer_id]
        self._shared.tell_released(entry.transfer_id)

    def _seek(self, pull: _Pull) -> None:
        while pull.endpoints:
            connection = self._shared.connect(self._links, pull.endpoints.popleft())
            if connection is not None:
                pull.connection = connection
                if connection.ready:
                    connection.send(pull.ask)
                return
        self._fail_pull(pull, pull.failure or not_reached())

    def _fail_pull(self, pull: _Pull, error: XllmError) -> None:
        if self.pulls.pop(pull.ask.transfer_id, None) is not None:
            self._shared.tell_failed(pull.ask.transfer_id, error)
            self._shared.tell_released(pull.ask.transfer_id)

    def _of(self, connection: Connection, transfer_id: str) -> Incoming | None:
        entry = self.by_id.get(transfer_id)
        return entry if entry is not None and entry.connection is connection else None

    def _leased(self, connection: Connection, transfer_id: str) -> Incoming:
        entry = self._of(connection, transfer_id)
        if entry is None or entry.phase is not Phase.LEASED:
            raise refused("a message about pages that are not leased to its sender")
        entry.mentioned_s = self._shared.now()
        return entry

    def _on(self, connection: Connection) -> list[Incoming]:
        return [entry for entry in self.by_id.values() if entry.connection is connection]


def _expired() -> UnavailableError:
    return UnavailableError("the sender has forgotten its transfer", code="transfer_expired")
