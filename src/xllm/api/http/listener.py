"""The listening socket and the set of its connections: the cap, and the drain at shutdown.

When the cap is reached the connection that has waited longest without a complete request makes
room, so a thousand silent connections cannot lock an honest client out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from xllm.api.http.connection import Connection
from xllm.api.http.exchange import Handler
from xllm.api.http.limits import HttpLimits
from xllm.api.http.tls import Certificate, Handshake, Waiting
from xllm.errors import UnavailableError


class Listener:
    """Made by `serve_connections`."""

    def __init__(self, limits: HttpLimits) -> None:
        self.draining = False
        self._limits = limits
        self._server: asyncio.Server
        self._all: set[Waiting] = set()
        # Insertion order is the order of waiting.
        self._waiting: dict[Waiting, None] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed = asyncio.Event()

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def num_connections(self) -> int:
        return len(self._all)

    def admit(self, connection: Waiting) -> bool:
        """Take a new connection; False when every one of the allowed ones is busy with a request."""
        full = len(self._all) >= self._limits.max_connections
        self._all.add(connection)
        self._empty.clear()
        if self.draining or (full and not self._waiting):
            return False
        if full:
            victim = next(iter(self._waiting))
            del self._waiting[victim]
            victim.stop_waiting(UnavailableError("Too many connections.", code="too_many_connections"))
        self._waiting[connection] = None
        return True

    def mark(self, connection: Waiting, *, busy: bool) -> None:
        self._waiting.pop(connection, None)
        if not busy:
            self._waiting[connection] = None
            if self.draining:
                self._stop_waiting()

    def forget(self, connection: Waiting) -> None:
        self._all.discard(connection)
        self._waiting.pop(connection, None)
        if not self._all:
            self._empty.set()

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing new, let running requests end; True when all did within the time."""
        self.draining = True
        self._server.close()
        self._stop_waiting()
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        finally:
            for connection in tuple(self._all):
                connection.abort()
            self._closed.set()
        return True

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def _stop_waiting(self) -> None:
        waiting, self._waiting = tuple(self._waiting), {}
        for connection in waiting:
            connection.stop_waiting(UnavailableError("The server is shutting down.", code="draining"))

    async def listen(
        self, handler: Handler, host: str, port: int, certificate: Certificate | None = None
    ) -> None:
        limits = self._limits

        def plain() -> asyncio.Protocol:
            return Connection(handler, limits, self)

        make: Callable[[], asyncio.Protocol] = plain
        if certificate is not None:
            make = partial(
                Handshake,
                plain,
                certificate.context,
                self,
                timeout_s=limits.header_timeout_s,
                shutdown_s=limits.linger_s,
            )
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(make, host, port, backlog=512)


async def serve_connections(
    handler: Handler, host: str, port: int, limits: HttpLimits, certificate: Certificate | None = None
) -> Listener:
    """Listen on host:port (0 = any free port), with TLS if there is a certificate.

    Raises OSError when the address is not free.
    """
    listener = Listener(limits)
    await listener.listen(handler, host, port, certificate)
    return listener
