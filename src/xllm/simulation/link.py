"""A simulated connection: two directed pipes with latency, back-pressure, EOF and faults.

Every message is encoded and decoded on its way, so that what works here can cross a socket. Order is
kept, as TCP keeps it; time, loss of the connection and repeated messages are the faults.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from xllm.simulation.loop import RESOLUTION_S
from xllm.wire.codec import HEADER, decode_engine, decode_front, encode
from xllm.wire.messages import EngineMessage, FrontMessage

BUFFER_BYTES = 256 * 1024
"""What two kernels' socket buffers take while the reader does not read."""


class Pipe:
    """One direction. `latency_s` may change at any time; `num_to_repeat` messages arrive twice.

    Invariant: `_items` is in order of sending; arrival times never decrease.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, latency_s: Callable[[], float]) -> None:
        self._loop = loop
        self._latency_s = latency_s
        self._items: deque[tuple[float, bytes | None]] = deque()
        self._num_bytes = 0
        self._last_arrival_s = 0.0
        self._ended = False
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.num_to_repeat = 0

    @property
    def full(self) -> bool:
        return self._num_bytes >= BUFFER_BYTES

    @property
    def ended(self) -> bool:
        """No more can be sent; what is on its way still arrives."""
        return self._ended

    def send(self, data: bytes) -> None:
        """Dropped when the pipe has ended."""
        if self._ended:
            return
        self._put(data)
        if self.num_to_repeat > 0:
            self.num_to_repeat -= 1
            self._put(data)

    def end(self) -> None:
        """EOF behind what is on its way: the sender closed, or its process died."""
        if not self._ended:
            self._put(None)
            self._ended = True
            self._release_writers()

    def cut(self) -> None:
        """EOF now; what was on its way is lost, as with a reset."""
        self._items.clear()
        self._num_bytes = 0
        self._last_arrival_s = self._loop.time()
        self._items.append((self._last_arrival_s, None))
        self._ended = True
        self._release_writers()
        self._wake()

    async def wait_writable(self) -> None:
        while self.full and not self._ended:
            writer = self._loop.create_future()
            self._writers.append(writer)
            await writer

    def take(self) -> tuple[bool, bytes | None]:
        """(True, the next arrived frame or None for EOF), or (False, None) when nothing has arrived."""
        if not self._items or self._items[0][0] > self._loop.time() + RESOLUTION_S:
            return False, None
        _, data = self._items[0]
        if data is None:
            return True, None  # EOF stays: every later read sees it again
        self._items.popleft()
        self._num_bytes -= len(data)
        if not self.full:
            self._release_writers()
        return True, data

    async def wait_readable(self) -> None:
        """Return once `take` would give something. One reader at a time."""
        while not self._items or self._items[0][0] > self._loop.time() + RESOLUTION_S:
            self._arm()
            self._reader = self._loop.create_future()
            await self._reader

    async def receive(self) -> bytes | None:
        await self.wait_readable()
        return self.take()[1]

    def _put(self, data: bytes | None) -> None:
        self._last_arrival_s = max(self._last_arrival_s, self._loop.time() + self._latency_s())
        self._items.append((self._last_arrival_s, data))
        self._num_bytes += len(data) if data is not None else 0
        if self._reader is not None:
            self._arm()

    def _arm(self) -> None:
        """One timer, for the head."""
        if self._timer is None and self._items:
            self._timer = self._loop.call_at(self._items[0][0], self._wake)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _release_writers(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)


class SimStream:
    """The front's end; an `EngineStream`."""

    def __init__(self, to_engine: Pipe, to_front: Pipe) -> None:
        self._to_engine = to_engine
        self._to_front = to_front

    async def send(self, message: FrontMessage) -> None:
        if self._to_engine.ended:
            raise ConnectionResetError("the simulated peer is gone")
        self._to_engine.send(encode(message))
        await self._to_engine.wait_writable()

    async def receive(self) -> EngineMessage | None:
        data = await self._to_front.receive()
        return None if data is None else decode_engine(data[HEADER.size :])

    async def close(self) -> None:
        self._to_engine.end()
        self._to_front.cut()


class EngineEnd:
    """The engine's end: sending never blocks, as the engine's own connection does not."""

    def __init__(self, to_engine: Pipe, to_front: Pipe) -> None:
        self.inbound = to_engine
        self.outbound = to_front

    def send(self, message: EngineMessage) -> None:
        self.outbound.send(encode(message))

    def take(self) -> tuple[bool, FrontMessage | None]:
        """As `Pipe.take`, decoded."""
        arrived, data = self.inbound.take()
        return arrived, None if data is None else decode_front(data[HEADER.size :])

    def inject(self, message: FrontMessage) -> None:
        """As if the peer had sent it: how a signal to the process is told to its loop."""
        self.inbound.send(encode(message))

    def die(self) -> None:
        """The process is gone: what it wrote still arrives, what it did not read is lost."""
        self.outbound.end()
        self.inbound.cut()

    def cut(self) -> None:
        """The network is gone, both processes live."""
        self.outbound.cut()
        self.inbound.cut()


def connect(loop: asyncio.AbstractEventLoop, latency_s: Callable[[], float]) -> tuple[SimStream, EngineEnd]:
    """Both ends of a new connection; `latency_s` is asked for every message of either direction."""
    to_engine, to_front = Pipe(loop, latency_s), Pipe(loop, latency_s)
    return SimStream(to_engine, to_front), EngineEnd(to_engine, to_front)
