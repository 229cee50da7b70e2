"""Connections to and from other engines: who is there, who is silent, who is gone. Knows no transfer.

Owned by the I/O thread. A connection is opened once per endpoint and kept; it is let go when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from xllm.engine.kvtransfer.connection import Arrival, Connection
from xllm.engine.kvtransfer.counters import TransferCounters
from xllm.engine.kvtransfer.endpoints import Endpoint, Road, begin_connect, same_user
from xllm.engine.kvtransfer.messages import BadFrameError, Ping
from xllm.errors import RequestError, UnavailableError, XllmError
from xllm.wire.hello import HANDSHAKE_S, Identity
from xllm.wire.sockets import tune

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
MAX_OUT_BYTES = 64 << 20
"""Waiting for one peer to read: a manifest and what `senders` lets wait, with room to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """`silent`: without a sign of life, or with bytes that do not move. `answer`: until the peer's step
    thread has answered. `lease`: pages are kept for a sender that does not mention them. `settle`: how long
    mooncake may still write what a peer that is gone has sent; `check`: how late what it brought may be."""

    silent_s: float = 2.0
    ping_s: float = 0.5
    connect_s: float = 1.0
    answer_s: float = 10.0
    lease_s: float = 10.0
    settle_s: float = 1.0
    check_s: float = 1.0


class Listener(Protocol):
    """What links tell, always on the I/O thread."""

    def ready(self, connection: Connection) -> None: ...

    def arrived(self, connection: Connection, arrival: Arrival) -> None:
        """May raise RequestError: the message is refused and counted, the connection goes on."""

    def silent(self, connection: Connection) -> None:
        """It has said nothing for too long although asked."""

    def gone(self, connection: Connection, error: XllmError) -> None:
        """It has ended; told once."""


class Links:
    def __init__(
        self,
        identity: Identity,
        listeners: Sequence[tuple[socket.socket, Road]],
        limits: TransferLimits,
        counters: TransferCounters,
        clock: Callable[[], float],
        listener: Listener,
    ) -> None:
        self._identity, self._limits, self._counters = identity, limits, counters
        self._now, self._listener = clock, listener
        self._selector = selectors.DefaultSelector()
        self._connections: list[Connection] = []
        self._by_endpoint: dict[Endpoint, Connection] = {}
        self._masks: dict[Connection, int] = {}
        self._awaiting: set[Connection] = set()
        self._ticked_s = 0.0
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._listeners = [s for s, _ in listeners]
        for sock, road in listeners:
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, road)

    @property
    def has_open_ends(self) -> bool:
        """Whether somebody has yet to prove who it is."""
        return any(not c.ready for c in self._connections)

    def wake(self) -> None:
        """From any thread: let `poll` return."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_out.send(b"\0")

    def open(self, endpoint: Endpoint) -> Connection | None:
        """A connection there, which may not be ready yet; None where that is hopeless."""
        known = self._by_endpoint.get(endpoint)
        if known is not None and not known.closed and not known.lost:
            return known
        try:
            sock = begin_connect(endpoint)
        except OSError:
            return None
        if endpoint.road == "unix" and not same_user(sock):
            sock.close()
            self._counters.dropped["other_user"] += 1
            return None
        connection = self._add(sock, endpoint.road, connecting=True)
        self._by_endpoint[endpoint] = connection
        return connection

    def poll(self, timeout_s: float | None) -> None:
        """Wait for and deal with what the sockets have."""
        if timeout_s is None:
            self._awaiting.clear()
        for connection in self._connections:
            self._watch(connection)
        for key, mask in self._selector.select(timeout_s):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif isinstance(key.data, Connection):
                self._serve(key.data, mask)
            else:
                self._accept(key.fileobj, key.data)  # type: ignore[arg-type]

    def flush(self) -> None:
        """Write what there is to write, without waiting."""
        now_s = self._now()
        for connection in [c for c in self._connections if c.connected and c.wants_write]:
            with self._guarding(connection):
                connection.flush(now_s)
            if connection.out_bytes > MAX_OUT_BYTES:
                # It asks and does not listen; pages never wait here in such numbers.
                self.drop(connection, lost())

    def tick(self, active: Mapping[Connection, Iterable[str]], now_s: float) -> None:
        """`active`: connections with transfers under way, and what we send over each."""
        limits = self._limits
        if now_s - self._ticked_s > limits.silent_s:
            # Nothing was under way, or it was this thread that did not run: nobody else was silent.
            self._awaiting.clear()
        self._ticked_s = now_s
        for connection in list(self._connections):
            if not connection.ready:
                allowed_s = limits.connect_s if connection.connecting else HANDSHAKE_S
                if now_s - connection.since_s > allowed_s:
                    self.drop(connection, _unreachable())
                continue
            sending = active.get(connection)
            if sending is None or connection.lost:
                self._awaiting.discard(connection)
                continue
            if connection not in self._awaiting:
                # Silence counts from when there is something to say.
                self._awaiting.add(connection)
                connection.heard_s = now_s
                connection.moved_s = max(connection.moved_s, now_s)
                connection.said_s = min(connection.said_s, now_s - limits.ping_s)
            stuck = connection.wants_write and now_s - connection.moved_s > limits.silent_s
            if stuck or now_s - connection.heard_s > limits.silent_s:
                connection.lost = True
                self._listener.silent(connection)
            elif now_s - connection.said_s >= limits.ping_s and not connection.wants_write:
                connection.send(Ping(sending=tuple(sending)))

    def drop(self, connection: Connection, error: XllmError) -> None:
        """End it; idempotent."""
        if connection.closed:
            return
        with contextlib.suppress(OSError, KeyError, ValueError):
            self._selector.unregister(connection.sock)
        with contextlib.suppress(OSError):
            connection.flush(self._now())  # a refusal, if one is due
        connection.close()
        self._connections.remove(connection)
        self._masks.pop(connection, None)
        self._awaiting.discard(connection)
        for endpoint in [e for e, c in self._by_endpoint.items() if c is connection]:
            del self._by_endpoint[endpoint]
        self._listener.gone(connection, error)

    def drop_all(self) -> None:
        for connection in list(self._connections):
            self.drop(connection, lost())

    def close(self) -> None:
        self.drop_all()
        for sock in (*self._listeners, self._wake_in, self._wake_out):
            sock.close()
        self._selector.close()

    def _add(self, sock: socket.socket, road: Road, *, connecting: bool) -> Connection:
        connection = Connection(sock, self._identity, road, connecting=connecting)
        connection.since_s = connection.heard_s = connection.moved_s = self._now()
        self._connections.append(connection)
        return connection

    def _accept(self, listener: socket.socket, road: Road) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        refused = None
        if len(self._connections) >= MAX_CONNECTIONS:
            refused = "too_many"
        elif road == "unix" and not same_user(sock):
            refused = "other_user"
        if refused is not None:
            self._counters.dropped[refused] += 1
            sock.close()
            return
        tune(sock)
        self._add(sock, road, connecting=False)

    def _watch(self, connection: Connection) -> None:
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_write else 0)
        before = self._masks.get(connection)
        if before is None:
            self._selector.register(connection.sock, mask, connection)
        elif before != mask:
            self._selector.modify(connection.sock, mask, connection)
        self._masks[connection] = mask

    def _serve(self, connection: Connection, mask: int) -> None:
        if connection.closed:
            return  # by what another one said
        now_s = self._now()
        with self._guarding(connection):
            if mask & selectors.EVENT_WRITE:
                if not connection.connected:
                    code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code:
                        raise OSError(code, "connect")
                    connection.begin()
                connection.flush(now_s)
            if mask & selectors.EVENT_READ:
                was_ready = connection.ready
                for arrival in connection.receive(now_s):
                    self._deliver(connection, arrival)
                if connection.ready and not was_ready and not connection.closed:
                    self._listener.ready(connection)

    def _deliver(self, connection: Connection, arrival: Arrival) -> None:
        try:
            self._listener.arrived(connection, arrival)
        except RequestError as error:
            self._counters.refused_messages += 1
            log.warning("a message about KV pages was refused: %s (%s)", error.message, error.code)

    @contextlib.contextmanager
    def _guarding(self, connection: Connection):  # type: ignore[no-untyped-def]
        try:
            yield
        except (EOFError, OSError):
            self.drop(connection, lost() if connection.ready else _unreachable())
        except XllmError as error:
            self._counters.dropped[error.code] += 1
            log.warning("a peer's connection was ended: %s (%s)", error.message, error.code)
            damaged = isinstance(error, BadFrameError) and connection.ready
            self.drop(connection, _damaged() if damaged else error)


def lost() -> UnavailableError:
    return UnavailableError("the connection to the peer ended during a transfer", code="transfer_lost")


def _unreachable() -> UnavailableError:
    return UnavailableError("the peer cannot be reached for a transfer", code="transfer_unreachable")


def _damaged() -> UnavailableError:
    return UnavailableError("a transfer was damaged on its way", code="transfer_corrupt")
