"""From a front and a config to a listening server, and from SIGTERM to a clean end.

The end: stop accepting and report not ready; running streams go on until they are done or the
time is over; then connections close. Engines are ended by whoever started them.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from xllm.api.app import App
from xllm.api.http import HttpLimits, Listener, serve_connections
from xllm.config import ServerConfig
from xllm.errors import ConfigError

log = logging.getLogger("xllm.api")

_SPARE_FDS = 64
"""File descriptors that are not for clients: engines, logs, models."""


class Drainable(Protocol):
    async def drain(self, timeout_s: float | None = None) -> bool: ...


class HttpServer:
    """`start`, then `wait_stopped`; or `run` for both with signals handled."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._listener: Listener | None = None
        self._stop = asyncio.Event()

    @property
    def port(self) -> int:
        """The port in use (the config may have said 0). Only after `start`."""
        if self._listener is None:
            raise ConfigError("the server has not started")
        return self._listener.port

    @property
    def num_connections(self) -> int:
        return self._listener.num_connections if self._listener else 0

    async def start(self) -> None:
        """Begin to listen. Raises ConfigError when the address cannot be had."""
        limits = _within_fd_limit(HttpLimits.from_config(self._config))
        host, port = self._config.host, self._config.port
        try:
            self._listener = await serve_connections(self._app, host, port, limits)
        except OSError as error:
            raise ConfigError(
                f"host, port: cannot listen on {host}:{port}; is another server running? try --port",
                code="address_in_use",
            ) from error

    def request_stop(self) -> None:
        """What a signal does."""
        self._stop.set()

    async def drain(self, front: Drainable, timeout_s: float) -> bool:
        """True when every running request ended by itself."""
        if self._listener is None:
            return True
        closing = asyncio.create_task(self._listener.drain(timeout_s + 5.0))
        in_time = await front.drain(timeout_s)
        await closing
        self._app.close()
        return in_time

    async def run(
        self, front: Drainable, timeout_s: float, on_listening: Callable[[int], None] | None = None
    ) -> None:
        """Serve until SIGTERM or SIGINT (a second one ends at once), then drain."""
        await self.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            if on_listening is not None:
                on_listening(self.port)
            await self._stop.wait()
            log.info("draining for at most %.0f s", timeout_s)
            in_time = await self.drain(front, timeout_s)
            log.info("drained" if in_time else "stopped with requests cut off")
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            raise SystemExit(128 + number)
        self._stop.set()


def _within_fd_limit(limits: HttpLimits) -> HttpLimits:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(16, soft - _SPARE_FDS)
    if soft == resource.RLIM_INFINITY or limits.max_connections <= most:
        return limits
    log.warning("max_connections lowered to %d: the limit of open files is %d", most, soft)
    return replace(limits, max_connections=most)
