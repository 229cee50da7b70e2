"""From an app and a config to a listening server, and from there to a clean end.

The end: stop accepting and report not ready; running streams go on until they are done or the
time is over; then connections close. Engines are ended by whoever started them.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from dataclasses import replace
from typing import Protocol

from xllm.api.app import App
from xllm.api.http import Certificate, HttpLimits, Listener, serve_connections
from xllm.config import ServerConfig
from xllm.errors import ConfigError

log = logging.getLogger("xllm.api")

_SPARE_FDS = 64
"""File descriptors that are not for clients: engines, logs, models."""


class Drainable(Protocol):
    async def drain(self, timeout_s: float | None = None) -> bool: ...


class HttpServer:
    """`start`, and `drain` at the end. Signals are the command line's matter."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._listener: Listener | None = None
        self._certificate: Certificate | None = None

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
        """Begin to listen. Raises ConfigError when the address or the certificate cannot be had."""
        self._certificate = _certificate(self._config)
        limits = _within_fd_limit(HttpLimits.from_config(self._config))
        host, port = self._config.host, self._config.port
        try:
            self._listener = await serve_connections(self._app, host, port, limits, self._certificate)
        except OSError as error:
            raise ConfigError(
                f"host, port: cannot listen on {host}:{port}; is another server running? try --port",
                code="address_in_use",
            ) from error

    def reload_certificate(self) -> None:
        """New connections get the certificate that the files hold now; running ones keep theirs.

        Raises ConfigError when it cannot be used; the old one stays then. Nothing to do without TLS.
        """
        if self._certificate is not None:
            self._certificate.reload()

    async def drain(self, front: Drainable, timeout_s: float) -> bool:
        """True when every running request ended by itself."""
        if self._listener is None:
            return True
        closing = asyncio.create_task(self._listener.drain(timeout_s + 5.0))
        in_time = await front.drain(timeout_s)
        await closing
        self._app.close()
        return in_time


def _certificate(config: ServerConfig) -> Certificate | None:
    if config.ssl_certfile:
        return Certificate(config.ssl_certfile, config.ssl_keyfile)
    if config.ssl_keyfile:
        raise ConfigError("ssl_keyfile: a key needs its certificate; set ssl_certfile", param="ssl_certfile")
    return None


def _within_fd_limit(limits: HttpLimits) -> HttpLimits:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(16, soft - _SPARE_FDS)
    if soft == resource.RLIM_INFINITY or limits.max_connections <= most:
        return limits
    log.warning("max_connections lowered to %d: the limit of open files is %d", most, soft)
    return replace(limits, max_connections=most)
