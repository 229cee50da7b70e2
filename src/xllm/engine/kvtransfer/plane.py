"""`Transfers` over sockets and shared memory: one I/O thread that connects, copies, checks and tells.

The step thread's calls are put into a queue and return at once. While nothing is under way the thread sleeps;
it reads and writes only pages that the step thread has given it, until it says Released.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from xllm.config import ClusterConfig
from xllm.engine.kvtransfer.base import Manifest, Pushed, Slots, TransferEvent
from xllm.engine.kvtransfer.connection import Arrival, Connection
from xllm.engine.kvtransfer.counters import TransferCounters
from xllm.engine.kvtransfer.endpoints import Road, boot_id, listen_tcp, listen_unix
from xllm.engine.kvtransfer.links import Links, TransferLimits, lost
from xllm.engine.kvtransfer.memory import KVMemory, StepWatch, Unwatched
from xllm.engine.kvtransfer.messages import (
    Accept,
    Ack,
    Ask,
    Cancel,
    Data,
    Done,
    Finish,
    Offer,
    Passed,
    Ping,
    Pong,
    Refuse,
    Wrote,
)
from xllm.engine.kvtransfer.mooncake import Mooncake
from xllm.engine.kvtransfer.outgoing import Backlog
from xllm.engine.kvtransfer.receivers import Receivers
from xllm.engine.kvtransfer.senders import Senders
from xllm.engine.kvtransfer.sharing import PageKind, Shared
from xllm.engine.time_slice import ask_usual_slice
from xllm.errors import ConfigError, ErrorInfo, UnavailableError, XllmError
from xllm.wire.hello import Identity, listen_address

log = logging.getLogger(__name__)

Ways = Literal["auto", "shm", "tcp", "mooncake"]

LAYER_POLL_S = 0.002
"""Between two looks at the progress word: a small part of a layer of a prefill, and little work itself."""

TICK_S = 0.05
_JOBS_PER_TURN = 4
MAX_TEXT = 300


class DataPlane:
    """`start`, then any call of `Transfers`. `tell` is called on the I/O thread and must not block."""

    def __init__(
        self,
        memory: KVMemory,
        kind: PageKind,
        identity: Identity,
        tell: Callable[[TransferEvent], None],
        *,
        watch: StepWatch | None = None,
        ways: Ways = "auto",
        listen: str = "127.0.0.1:0",
        advertise: str | None = None,
        limits: TransferLimits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Binds its endpoints. `identity` is an instance's, with the key that its peers have; `advertise` the
        host at which they reach `listen`. Raises ConfigError."""
        self.counters = TransferCounters()
        self._now = clock
        self._watch: StepWatch = watch or Unwatched()
        self._forwards = 0
        self._layered = False
        self._backlogs: dict[str, Backlog] = {}
        self._last_s = self._next_tick_s = 0.0
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        here = boot_id()
        host, port = listen_address(ClusterConfig(listen=listen), identity.key)
        mooncake = Mooncake(memory, advertise or host) if ways == "mooncake" else None
        listeners, self._endpoints = _listen(ways, here, host, port, advertise)
        self._shared = Shared(
            memory=memory,
            kind=kind,
            limits=limits or TransferLimits(),
            counters=self.counters,
            now=clock,
            tell=tell,
            post=self._post,
            here=here,
            mooncake=mooncake,
        )
        self._links = Links(identity, listeners, self._shared.limits, self.counters, clock, self)
        self._senders = Senders(self._shared, self._links)
        self._receivers = Receivers(self._shared, self._links)
        self._thread = threading.Thread(target=self._run, name="kv-io", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- Transfers: from the step thread -------------------------------------------------------------

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self._endpoints

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        self._backlogs = {name: b for name, b in self._backlogs.items() if not b.ended}
        backlog = self._backlogs[transfer_id] = Backlog()
        self._post(partial(self._senders.send, transfer_id, endpoints, num_pages, backlog))

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        if pushed.after_layer:
            # The word still speaks of the step before; nobody may read it as this one's.
            self._watch.forget_layers()
            self._forwards = self._watch.num_forwards
            self._layered = True
        if (backlog := self._backlogs.get(transfer_id)) is not None:
            backlog.num_pushed += sum(map(len, pushed.pages))
        self._post(partial(self._senders.push, transfer_id, pushed))

    def num_pending(self, transfer_id: str) -> int | None:
        backlog = self._backlogs.get(transfer_id)
        if backlog is None or not backlog.accepted or backlog.ended:
            return None
        return backlog.num_pending

    def step_done(self) -> None:
        if self._layered:
            # A step that failed and was run again in parts has told of layers that others' rows lacked.
            trusted = self._watch.num_forwards == self._forwards + 1
            self._layered = False
            self._post(partial(self._senders.step_done, trusted))

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        self._post(partial(self._senders.finish, transfer_id, manifest, self._now()))

    def accept(self, transfer_id: str, slots: Slots) -> None:
        self._post(partial(self._receivers.accept, transfer_id, slots))

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        self._post(partial(self._receivers.refuse, transfer_id, error.to_error()))

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        ask = Ask(transfer_id=transfer_id, root=root, digests=digests)
        self._post(partial(self._receivers.pull, ask, endpoints))

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        self._post(partial(self._give, transfer_id, pushed, manifest))

    def cancel(self, transfer_id: str) -> None:
        self._post(partial(self._cancel, transfer_id))

    def close(self) -> None:
        """Ends all connections; no event follows. Idempotent."""
        self._closing = True
        self._links.wake()
        if self._thread.ident is None:
            self._links.close()
        elif threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        if self._shared.mooncake is not None:
            self._shared.mooncake.close()

    # -- the I/O thread ------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._links.wake()

    def _run(self) -> None:
        # Started by a step thread it would inherit that one's long slice.
        ask_usual_slice()
        self._last_s = self._now()
        while not self._closing:
            try:
                self._turn()
            except Exception:
                # Ends all transfers, each with its events, and no others.
                log.exception("a turn of the transfer thread failed; its connections are ended")
                self._links.drop_all()
                time.sleep(TICK_S)
        self._shared.tell = _nobody
        self._links.close()

    def _turn(self) -> None:
        senders, receivers, links = self._senders, self._receivers, self._links
        used_s = time.thread_time()
        # Peers first: what they have cancelled is not written any more.
        links.poll(self._timeout_s())
        while self._commands:
            self._commands.popleft()()
        if senders.watch_layers:
            senders.layers_done(self._watch.finished_layers)
        for _ in range(_JOBS_PER_TURN):
            senders.work()
        if receivers.is_checking:
            receivers.check()
        links.flush()
        senders.rest(time.thread_time() - used_s)
        now_s = self._now()
        senders.pass_time(now_s - self._last_s)
        self._last_s = now_s
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            links.tick(self._active(), now_s)
            senders.tick(now_s)
            receivers.tick(now_s)
            links.flush()

    def _timeout_s(self) -> float | None:
        if self._commands or self._closing:
            return 0.0
        rest_s = self._senders.wait_s(self._now())
        if self._senders.watch_layers or self._receivers.is_checking:
            return LAYER_POLL_S if rest_s is None else min(rest_s, LAYER_POLL_S)
        if rest_s is not None:
            return min(rest_s, TICK_S)
        receivers = self._receivers
        under_way = self._senders.by_id or receivers.by_id or receivers.pulls or receivers.is_settling
        return TICK_S if under_way or self._links.has_open_ends else None

    def _active(self) -> dict[Connection, list[str]]:
        active: dict[Connection, list[str]] = {}
        for out in self._senders.by_id.values():
            if out.connection is not None:
                active.setdefault(out.connection, []).append(out.transfer_id)
        waiting: Iterable[Connection | None] = (
            *(e.connection for e in self._receivers.by_id.values()),
            *(p.connection for p in self._receivers.pulls.values()),
        )
        for connection in waiting:
            if connection is not None:
                active.setdefault(connection, [])
        return active

    def _give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        connection = self._receivers.asked_by(transfer_id)
        if connection is None:
            # Who asked has gone; the step thread waits for its pages all the same.
            self._shared.tell_failed(transfer_id, lost())
            self._shared.tell_released(transfer_id)
        else:
            self._senders.give(transfer_id, connection, pushed, manifest)

    def _cancel(self, transfer_id: str) -> None:
        if not self._senders.cancel(transfer_id) and not self._receivers.cancel(transfer_id):
            self._shared.tell_released(transfer_id)  # nothing of it is left here

    # -- links.Listener ------------------------------------------------------------------------------

    def ready(self, connection: Connection) -> None:
        self._senders.ready(connection)
        self._receivers.ready(connection)

    def silent(self, connection: Connection) -> None:
        log.warning("a peer has been silent during a transfer for too long")
        self._senders.silent(connection)
        self._receivers.silent(connection)
        if connection.road == "tcp":
            self._links.drop(connection, lost())
        # Otherwise it may still write to our pages: kept, to hear that it has stopped or is gone.

    def gone(self, connection: Connection, error: XllmError) -> None:
        self._senders.gone(connection, error)
        self._receivers.gone(connection, error)

    def arrived(self, connection: Connection, arrival: Arrival) -> None:
        senders, receivers, message = self._senders, self._receivers, arrival.message
        match message:
            case Ping():
                receivers.mentioned(connection, message.sending)
                connection.send(Pong())
            case Data():
                receivers.data(connection, arrival, message)
            case Passed():
                receivers.passed(connection, message)
            case Wrote():
                receivers.wrote(connection, message)
            case Offer():
                receivers.offered(connection, message)
            case Ask():
                receivers.asked(connection, message)
            case Finish():
                receivers.finished(connection, message)
            case Ack():
                receivers.acked(connection, message.transfer_id)
            case Accept():
                senders.accepted(connection, message)
            case Done():
                senders.done(connection, message.transfer_id)
            case Refuse():
                error = _told(message.error)
                if not senders.refused(connection, message.transfer_id, error):
                    receivers.refused(connection, message.transfer_id, error)
            case Cancel():
                self._cancelled(connection, message)
            case Pong():
                pass

    def _cancelled(self, connection: Connection, message: Cancel) -> None:
        error, transfer_id = _told(message.error), message.transfer_id
        if self._senders.cancelled(connection, transfer_id, error):
            return
        if not self._receivers.cancelled(connection, transfer_id, error):
            # Ended here before: whoever still holds pages for us must hear that we do not write.
            connection.send(Ack(transfer_id=transfer_id))


def _listen(
    ways: Ways, here: str, host: str, port: int, advertise: str | None
) -> tuple[list[tuple[socket.socket, Road]], tuple[str, ...]]:
    """Best first. Raises ConfigError."""
    listeners: list[tuple[socket.socket, Road]] = []
    endpoints: list[str] = []
    if ways in ("auto", "shm") and here:
        try:
            unix, endpoint = listen_unix(here)
        except OSError as error:
            if ways == "shm":
                raise ConfigError(
                    f"transfer=shm: this system has no abstract sockets ({error.strerror})", param="transfer"
                ) from error
        else:
            listeners.append((unix, "unix"))
            endpoints.append(endpoint)
    if ways != "shm":
        road: Road = "mooncake" if ways == "mooncake" else "tcp"
        tcp, endpoint = listen_tcp(host, port, road, advertise)
        listeners.append((tcp, road))
        endpoints.append(endpoint)
    return listeners, tuple(endpoints)


def _told(info: ErrorInfo) -> XllmError:
    """A peer's reason; its text is bounded. Whatever its class there, here the peer cannot be used."""
    return UnavailableError(info.message[:MAX_TEXT], code=info.code[:64])


def _nobody(event: TransferEvent) -> None:
    return
