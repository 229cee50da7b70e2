"""TLS before HTTP: the certificate, and connections until their handshake is done.

A connection counts against the cap from its first packet, like any other that waits for a request, so
clients that never finish a handshake cannot lock others out. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from xllm.errors import ConfigError, XllmError


class Certificate:
    """The server's certificate and key, and the TLS settings: 1.2 at least, no renegotiation."""

    def __init__(self, certfile: str, keyfile: str | None) -> None:
        """Raises ConfigError when the pair cannot be used. Without a keyfile the key stands in `certfile`."""
        self._certfile, self._keyfile = Path(certfile).expanduser(), keyfile and Path(keyfile).expanduser()
        self.context = self._load()

    def reload(self) -> None:
        """Take the files as they are now for new connections; raises ConfigError and keeps the old ones."""
        # Tried by itself first: a pair that does not match would leave the live context with half of it.
        self._load()
        self.context.load_cert_chain(self._certfile, self._keyfile or None, password=_no_password)

    def _load(self) -> ssl.SSLContext:
        for name, path in (("ssl_certfile", self._certfile), ("ssl_keyfile", self._keyfile)):
            _check_readable(name, path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._certfile, self._keyfile or None, password=_no_password)
        except ssl.SSLError as error:
            raise _unusable(error) from error
        return context


def _check_readable(name: str, path: Path | str | None) -> None:
    if not path:
        return
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot read {path} ({error.strerror}); check its path and rights", param=name
        ) from error


def _unusable(error: ssl.SSLError) -> ConfigError:
    if error.reason == "KEY_VALUES_MISMATCH":
        message = (
            "ssl_keyfile: the key does not belong to the certificate; name the pair that was made together"
        )
        return ConfigError(message, param="ssl_keyfile")
    return ConfigError(
        "ssl_certfile, ssl_keyfile: no certificate and key in PEM that can be used; the chain begins with "
        "the server's own certificate, and without ssl_keyfile its key stands in the same file",
        param="ssl_certfile",
    )


def _no_password() -> str:
    # Asked for on the terminal otherwise, where a server would wait for ever.
    raise ConfigError("ssl_keyfile: the key is encrypted; give one without a passphrase", param="ssl_keyfile")


class Waiting(Protocol):
    """What the listener may do to a connection that has no complete request yet."""

    def stop_waiting(self, error: XllmError) -> None: ...

    def abort(self) -> None: ...


class WaitingRoom(Protocol):
    """Who counts connections (the listener)."""

    def admit(self, connection: Waiting) -> bool: ...

    def forget(self, connection: Waiting) -> None: ...


class Handshake(asyncio.Protocol):
    """A TCP connection until it speaks TLS; then `make` gives the protocol that takes over."""

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        room: WaitingRoom,
        *,
        timeout_s: float,
        shutdown_s: float,
    ) -> None:
        self._make, self._context, self._room = make, context, room
        self._timeout_s, self._shutdown_s = timeout_s, shutdown_s
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  asyncio's promise, not data
        self._transport = transport
        # The first bytes are for TLS, which is not there before the next turn of the loop.
        transport.pause_reading()
        if not self._room.admit(self):
            transport.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._run())

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.forget(self)

    def stop_waiting(self, error: XllmError) -> None:
        """There is nobody to tell anything yet."""
        self.abort()

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()

    async def _run(self) -> None:
        gate = _Gate()
        try:
            upgraded = await asyncio.get_running_loop().start_tls(
                self._transport,
                gate,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._timeout_s,
                ssl_shutdown_timeout=self._shutdown_s,
            )
        except (OSError, asyncio.CancelledError):
            # No TLS, an old version of it, too slow, or gone: all look the same from outside.
            upgraded = None
        finally:
            self._room.forget(self)
        if upgraded is None:
            self._transport.abort()
        else:
            gate.open(upgraded, self._make())


class _Gate(asyncio.Protocol):
    """Holds what comes between the end of the handshake and the moment when somebody is told of it."""

    def __init__(self) -> None:
        self._early = bytearray()
        self._eof = False
        self._lost = False

    def data_received(self, data: bytes) -> None:
        self._early += data

    def eof_received(self) -> None:
        self._eof = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    def open(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        if self._lost:
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._early:
            protocol.data_received(bytes(self._early))
        if self._eof:
            protocol.eof_received()
