"""A connection between a front and an engine inside one event loop.

Messages pass through the real codec, so whatever cannot cross a process border fails here too.
Unbounded: a test that wants back-pressure counts messages itself.
"""

from __future__ import annotations

import asyncio

from xllm.wire.codec import HEADER, decode_engine, decode_front, encode
from xllm.wire.messages import EngineMessage, FrontMessage


class _Link:
    """Both directions; None in a queue is EOF."""

    def __init__(self) -> None:
        self.to_engine: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.to_front: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.to_engine.put_nowait(None)
            self.to_front.put_nowait(None)


class MemoryEngineStream:
    """The front's end; an `EngineStream`."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    async def send(self, message: FrontMessage) -> None:
        if self._link.closed:
            raise ConnectionResetError
        self._link.to_engine.put_nowait(encode(message))

    async def receive(self) -> EngineMessage | None:
        frame = await self._link.to_front.get()
        return None if frame is None else decode_engine(frame[HEADER.size :])

    async def close(self) -> None:
        self._link.close()


class MemoryEngineEnd:
    """The engine's end."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def send(self, message: EngineMessage) -> None:
        """Dropped when the front is gone, as in the engine's own connection."""
        if not self._link.closed:
            self._link.to_front.put_nowait(encode(message))

    def send_garbage(self) -> None:
        """A frame that is no message."""
        self._link.to_front.put_nowait(HEADER.pack(3) + b"\xc1\xc1\xc1")

    @property
    def num_waiting(self) -> int:
        """Messages that `receive` would give at once."""
        return self._link.to_engine.qsize()

    async def receive(self) -> FrontMessage | None:
        frame = await self._link.to_engine.get()
        return None if frame is None else decode_front(frame[HEADER.size :])

    def close(self) -> None:
        """As if the process had died."""
        self._link.close()


def memory_pair() -> tuple[MemoryEngineStream, MemoryEngineEnd]:
    """Both ends of a new connection."""
    link = _Link()
    return MemoryEngineStream(link), MemoryEngineEnd(link)
