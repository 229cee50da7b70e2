"""All transfers that this engine sends: offers, copies, ends. On the I/O thread only.

What is copied when stands in `outgoing`; connections in `links`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from xllm.engine.kvtransfer.base import Manifest, Pushed, Sent
from xllm.engine.kvtransfer.connection import Connection
from xllm.engine.kvtransfer.copying import copy_parts, gather
from xllm.engine.kvtransfer.links import Links
from xllm.engine.kvtransfer.messages import Accept, Ack, Cancel, Data, Offer
from xllm.engine.kvtransfer.outgoing import Backlog, Outgoing, Part, Step
from xllm.engine.kvtransfer.pacing import HURRY_S, Pacer
from xllm.engine.kvtransfer.sharing import Shared, cancelled, no_answer, not_reached
from xllm.engine.kvtransfer.window import Window
from xllm.errors import InternalError, UnavailableError, XllmError

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 4 << 20
"""Waiting in front of a socket; pages themselves wait where they are."""


class Senders:
    def __init__(self, shared: Shared, links: Links) -> None:
        self._shared, self._links = shared, links
        self.by_id: dict[str, Outgoing] = {}
        self._pacer = Pacer()
        self._paced_work = False
        self._quieting: set[Outgoing] = set()
        """Ended, but for a part that is with mooncake."""

    # -- the step thread's calls ---------------------------------------------------------------------

    def send(
        self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...], backlog: Backlog
    ) -> None:
        if transfer_id in self.by_id:
            log.error("a transfer was begun twice")
            return
        out = self._new(transfer_id, num_pages)
        out.backlog = backlog
        out.endpoints = deque(endpoints)
        self._seek(out)

    def give(self, transfer_id: str, connection: Connection, pushed: Pushed, manifest: Manifest) -> None:
        """Send all of it to who asked over `connection`."""
        if transfer_id in self.by_id:
            log.error("a transfer was given twice")
            return
        out = self._new(transfer_id, tuple(max(g, default=-1) + 1 for g in pushed.indices))
        out.connection = connection
        if connection.closed:
            self.fail(out, not_reached())
            return
        self._offer(out)
        self.push(transfer_id, pushed)
        self.finish(transfer_id, manifest, out.since_s)

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        out = self.by_id.get(transfer_id)
        if out is None:
            return
        try:
            out.push(pushed)
        except XllmError as error:
            log.error("a push cannot be done: %s", error.message)
            self.fail(out, error)

    def step_done(self, trusted: bool) -> None:
        for out in self.by_id.values():
            out.step_done(trusted)

    def finish(self, transfer_id: str, manifest: Manifest, at_s: float) -> None:
        out = self.by_id.get(transfer_id)
        if out is not None and not out.finishing:
            out.finish(manifest, at_s)

    def cancel(self, transfer_id: str) -> bool:
        out = self.by_id.get(transfer_id)
        if out is not None:
            self._end(out, partial(self._say_cancel, out, cancelled()))
        return out is not None or any(o.transfer_id == transfer_id for o in self._quieting)

    # -- what peers say ------------------------------------------------------------------------------

    def accepted(self, connection: Connection, message: Accept) -> None:
        out = self._of(connection, message.transfer_id)
        if message.has_fd:
            # Mapped even if nobody waits for it any more: the descriptor comes once.
            self._map(connection, message)
        if out is None or out.step is not Step.OFFERED:
            return
        try:
            self._check(out, connection, message)
        except XllmError as error:
            self.fail(out, error)
            return
        out.accepted, out.step, out.since_s = message, Step.ACCEPTED, self._shared.now()
        out.backlog.accepted = True

    def refused(self, connection: Connection, transfer_id: str, error: XllmError) -> bool:
        out = self._of(connection, transfer_id)
        if out is not None:
            self.fail(out, error, tell_peer=False)
        return out is not None

    def cancelled(self, connection: Connection, transfer_id: str, error: XllmError) -> bool:
        """The receiver gives up and wants to hear when nobody writes any more."""
        out = self._of(connection, transfer_id)
        ack = partial(connection.send, Ack(transfer_id=transfer_id))
        if out is None:
            for other in self._quieting:
                if other.transfer_id == transfer_id and other.connection is connection:
                    return True  # its own end says so in time
            return False
        self._shared.tell_failed(transfer_id, error)
        self._end(out, ack)
        return True

    def done(self, connection: Connection, transfer_id: str) -> None:
        out = self._of(connection, transfer_id)
        if out is None or out.step is not Step.FINISHED:
            return
        del self.by_id[transfer_id]
        out.backlog.ended = True
        counters, now_s = self._shared.counters, self._shared.now()
        counters.num_sent += 1
        counters.bytes_sent += out.num_bytes
        self._shared.tell(
            Sent(
                transfer_id=transfer_id,
                num_bytes=out.num_bytes,
                transfer_ms=out.moving_s * 1000,
                exposed_ms=(now_s - out.finish_s) * 1000,
            )
        )
        self._shared.tell_released(transfer_id)

    # -- what links and time say ---------------------------------------------------------------------

    def ready(self, connection: Connection) -> None:
        for out in list(self.by_id.values()):
            if out.connection is connection and out.step is Step.CONNECTING:
                self._offer(out)

    def silent(self, connection: Connection) -> None:
        for out in self._on(connection):
            self.fail(out, no_answer())

    def gone(self, connection: Connection, error: XllmError) -> None:
        for out in self._on(connection):
            if out.step is Step.CONNECTING and out.endpoints:
                out.failure, out.connection = error, None
                self._seek(out)
            else:
                self.fail(out, error, tell_peer=False)

    def tick(self, now_s: float) -> None:
        for out in list(self.by_id.values()):
            waits = out.step in (Step.OFFERED, Step.FINISHED) and not self._queued(out)
            if waits and now_s - out.since_s > self._shared.limits.answer_s:
                self.fail(out, no_answer())

    @property
    def watch_layers(self) -> bool:
        return any(out.watches_layers for out in self.by_id.values())

    def layers_done(self, finished: int) -> None:
        for out in self.by_id.values():
            out.layers_done(finished)

    def wait_s(self, now_s: float) -> float | None:
        """Until there is something to do; None = not before something happens."""
        able = [out for out in self.by_id.values() if out.has_jobs and not self._blocked(out)]
        if not able:
            return None
        return min(self._pacer.rest_s(now_s) if self._is_paced(out, now_s) else 0.0 for out in able)

    def work(self) -> None:
        """One job of each transfer that can."""
        for out in list(self.by_id.values()):
            if not out.has_jobs or self._blocked(out) or out.connection is None:
                continue
            started_s = self._shared.now()
            paced = self._is_paced(out, started_s)
            if paced and self._pacer.rest_s(started_s):
                continue
            try:
                out.work(self._write, out.connection.send)
            except XllmError as error:
                self.fail(out, error)
                continue
            now_s = self._shared.now()
            out.moving_s += now_s - started_s
            self._paced_work |= paced
            if out.step is Step.FINISHED:
                out.since_s = now_s

    def rest(self, used_s: float) -> None:
        """The thread's turn took so much processor time, what went into sockets included. Not time by the
        clock: on a busy machine most of that is others'."""
        now_s = self._shared.now()
        paced = [out for out in self.by_id.values() if self._is_paced(out, now_s)]
        if paced and (self._paced_work or any(map(self._queued, paced))):
            self._worked(used_s, now_s, paced)
        self._paced_work = False

    def pass_time(self, elapsed_s: float) -> None:
        """Bytes of these transfers were on their way all the while."""
        for out in self.by_id.values():
            queued = self._queued(out)
            if out.in_flight or queued:
                out.moving_s += elapsed_s
            unsent = out.connection.out_bytes if queued and out.connection is not None else 0
            out.backlog.num_unsent = unsent / max(self._shared.memory.page_bytes)

    def fail(self, out: Outgoing, error: XllmError, tell_peer: bool = True) -> None:
        if self.by_id.get(out.transfer_id) is not out:
            return
        self._shared.tell_failed(out.transfer_id, error)
        self._end(out, partial(self._say_cancel, out, error) if tell_peer else None)

    # -- parts ---------------------------------------------------------------------------------------

    def _new(self, transfer_id: str, num_pages: tuple[int, ...]) -> Outgoing:
        now_s = self._shared.now()
        out = Outgoing(transfer_id, self._shared.memory, num_pages, since_s=now_s)
        self.by_id[transfer_id] = out
        return out

    def _seek(self, out: Outgoing) -> None:
        while out.endpoints:
            connection = self._shared.connect(self._links, out.endpoints.popleft())
            if connection is not None:
                out.connection = connection
                if connection.ready:
                    self._offer(out)
                return
        self.fail(out, out.failure or not_reached(), tell_peer=False)

    def _offer(self, out: Outgoing) -> None:
        kind, memory = self._shared.kind, self._shared.memory
        out.step, out.since_s = Step.OFFERED, self._shared.now()
        if out.connection is not None:
            out.connection.send(
                Offer(
                    transfer_id=out.transfer_id,
                    num_pages=out.num_pages,
                    page_bytes=memory.page_bytes,
                    page_size=kind.page_size,
                    numerics_class=kind.numerics_class,
                    layout_digest=kind.layout_digest,
                )
            )

    def _map(self, connection: Connection, message: Accept) -> None:
        if connection.road == "unix" and connection.window is None:
            try:
                connection.window = Window(
                    connection.take_fd(), message.window, self._shared.memory.page_bytes
                )
            except UnavailableError as error:
                log.warning("%s", error.message)

    def _check(self, out: Outgoing, connection: Connection, message: Accept) -> None:
        """Raises XllmError for slots that may not be written to."""
        if tuple(map(len, message.slots)) != out.num_pages:
            raise _not_usable()
        room: tuple[int | None, ...]
        if message.way == "shm":
            if connection.window is None:
                raise _not_usable()
            room = tuple(len(g) for g in connection.window.groups)
        elif message.way == "mooncake":
            if self._shared.mooncake is None or connection.road != "mooncake":
                raise _not_usable()
            if len(message.bases) != len(out.num_pages) or not message.session:
                raise _not_usable()
            room = (None,) * len(out.num_pages)
        else:
            room = (None,) * len(out.num_pages)
        for slots, most in zip(message.slots, room, strict=True):
            if any(slot < 0 or (most is not None and slot >= most) for slot in slots):
                raise _not_usable()

    def _write(self, out: Outgoing, part: Part, slots: tuple[int, ...]) -> None:
        connection, accepted = out.connection, out.accepted
        if connection is None or accepted is None or connection.closed:
            raise InternalError("a part is sent to nobody")
        source = self._shared.memory.groups[part.group].pages
        if accepted.way == "shm":
            if connection.window is None:
                raise _not_usable()
            target = connection.window.groups[part.group]
            copy_parts(target, slots, source, part.pages, part.offset, part.length)
        elif accepted.way == "stream":
            data = Data(
                transfer_id=out.transfer_id,
                group=part.group,
                indices=part.indices,
                offset=part.offset,
                length=part.length,
            )
            connection.send(data, gather(source, part.pages, part.offset, part.length))
        elif self._shared.mooncake is not None:
            out.in_flight, out.in_flight_s = True, self._shared.now()

            def back(ok: bool) -> None:
                self._shared.post(partial(self._back, out, ok))

            self._shared.mooncake.write(part, slots, accepted.session, accepted.bases, back)

    def _back(self, out: Outgoing, ok: bool) -> None:
        """Mooncake has done with a part. It has threads of its own, so its time is taken by the clock."""
        out.in_flight = False
        now_s = self._shared.now()
        if self._is_paced(out, now_s):
            self._worked(now_s - out.in_flight_s, now_s, [out])
        if not ok:
            self.fail(out, UnavailableError("mooncake could not write to the peer", code="transfer_lost"))
        if out in self._quieting:
            self._quieting.discard(out)
            if out.on_quiet is not None:
                out.on_quiet()

    def _end(self, out: Outgoing, say: Callable[[], None] | None) -> None:
        """Forget it. The peer hears, and the step thread has its pages back, once nothing is in flight."""
        del self.by_id[out.transfer_id]
        out.backlog.ended = True

        def quiet() -> None:
            if say is not None:
                say()
            self._shared.tell_released(out.transfer_id)

        if out.in_flight:
            out.on_quiet = quiet
            self._quieting.add(out)
        else:
            quiet()

    def _say_cancel(self, out: Outgoing, error: XllmError) -> None:
        if out.connection is not None and out.step is not Step.CONNECTING:
            out.connection.send(Cancel(transfer_id=out.transfer_id, error=error.info()))

    def _of(self, connection: Connection, transfer_id: str) -> Outgoing | None:
        out = self.by_id.get(transfer_id)
        return out if out is not None and out.connection is connection else None

    def _on(self, connection: Connection) -> list[Outgoing]:
        return [out for out in self.by_id.values() if out.connection is connection]

    def _is_paced(self, out: Outgoing, now_s: float) -> bool:
        """Whether its sequence runs on meanwhile: what is copied beside steps takes time from them."""
        return not out.finishing and now_s - out.since_s < HURRY_S

    def _worked(self, took_s: float, now_s: float, of: list[Outgoing]) -> None:
        age_s = now_s - min(out.since_s for out in of)
        self._pacer.worked(took_s, now_s, age_s=age_s, num_transfers=len(self.by_id))

    def _queued(self, out: Outgoing) -> bool:
        """Bytes of it may wait in front of the socket."""
        sent = out.step in (Step.ACCEPTED, Step.FINISHED) and out.num_bytes > 0
        return sent and out.connection is not None and out.connection.out_bytes > 0

    def _blocked(self, out: Outgoing) -> bool:
        return out.connection is not None and out.connection.out_bytes >= MAX_QUEUED_BYTES


def _not_usable() -> UnavailableError:
    return UnavailableError("the peer named pages that cannot be written to", code="transfer_refused")
