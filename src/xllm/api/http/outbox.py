"""The sending side of a connection: back pressure while it lives, and the ways in which it ends.

Knows nothing of requests; bytes come from h11.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xllm.api.http.limits import HttpLimits


class Outbox:
    """Wraps the transport. `lost` is called once when the connection is gone."""

    def __init__(self, transport: asyncio.Transport, limits: HttpLimits) -> None:
        self._transport = transport
        self.is_tls = transport.get_extra_info("ssl_object") is not None
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._writable = asyncio.Event()
        self._writable.set()
        self._timers: list[asyncio.TimerHandle] = []
        transport.set_write_buffer_limits(high=limits.write_buffer_bytes)

    def write(self, data: bytes) -> None:
        if data and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def writable(self) -> bool:
        """The client reads as fast as is written to it."""
        return self._writable.is_set()

    async def drained(self) -> None:
        """Wait while the client reads too slowly. Raises ConnectionResetError when it stopped."""
        if self._writable.is_set():
            return
        try:
            await asyncio.wait_for(self._writable.wait(), self._limits.write_timeout_s)
        except TimeoutError:
            self.abort()
            raise ConnectionResetError("the client stopped reading") from None

    def pause(self) -> None:
        self._writable.clear()

    def resume(self) -> None:
        self._writable.set()

    def lost(self) -> None:
        self._writable.set()
        for timer in self._timers:
            timer.cancel()

    def close(self, *, linger: bool = False) -> None:
        """Close when all is written. `linger` when input may be unread: closing over it would reset the
        connection and with it the reply, so only our side ends at first. TLS reads on by itself while it
        says goodbye."""
        if self._transport.is_closing():
            return
        if linger and not self.is_tls:
            try:
                self._transport.write_eof()
            except OSError:  # ENOTCONN: the client has reset the connection and nobody told us yet
                self.abort()
                return
            self._later(self._limits.linger_s, self._transport.close)
        else:
            self._transport.close()
        self._later(self._limits.linger_s + self._limits.write_timeout_s, self._transport.abort)

    def close_idle(self) -> None:
        """Close what waits for nothing; a client that has not even read its last answer is cut off."""
        if self._writable.is_set():
            self._transport.close()
        else:
            self.abort()

    def abort(self) -> None:
        self._transport.abort()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(self._loop.call_later(seconds, call))
