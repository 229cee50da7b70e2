"""Message streams for the asyncio side (fronts): over a connected socket or in memory.

EOF is the crash signal; nothing is queued for a peer that is gone. The engine side is
blocking and lives in `engine/process.py`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from xllm.wire.codec import HEADER, MAX_FRAME_BYTES, body_length, decode_engine, encode
from xllm.wire.messages import EngineMessage, FrontMessage


class EngineStream(Protocol):
    """A front's end of one connection to one incarnation of an engine."""

    async def send(self, message: FrontMessage) -> None:
        """Hand over the message; waits while the peer's buffer is full. ConnectionError when it is gone."""

    async def receive(self) -> EngineMessage | None:
        """The next message, or None at EOF. Raises WireError on garbage."""

    async def close(self) -> None:
        """Close both directions; idempotent."""


class SocketEngineStream:
    """Length-prefixed msgpack over a connected Unix or TCP socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> SocketEngineStream:
        """Take ownership of a connected socket."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_FRAME_BYTES + HEADER.size)
        return cls(reader, writer)

    async def send(self, message: FrontMessage) -> None:
        self._writer.write(encode(message))
        await self._writer.drain()

    async def receive(self) -> EngineMessage | None:
        try:
            header = await self._reader.readexactly(HEADER.size)
            body = await self._reader.readexactly(body_length(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return decode_engine(body)

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return
