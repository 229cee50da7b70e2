"""A TCP proxy that misbehaves on request: cuts, delays, holds, resets, corrupts, slows, repeats. Loopback.

Runs on a thread of its own, so that tests of any kind can use it. Every fault is counted: a test
first looks whether its fault happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from xllm.engine.kvtransfer.messages import FRAME

CHUNK_BYTES = 16 * 1024
_HANDSHAKE_FRAMES = 2
"""From each side: who it is, and the proof of it."""

Way = Literal["both", "up", "down"]
"""up = from the client to the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toxics:
    """What is wrong at the moment. `blackhole` holds bytes until it ends, as a lost route does to TCP.

    `corrupt_after` flips one bit in every chunk beyond so many bytes of a connection. `refuse` closes new
    connections at once. `repeat`: every message of the transfers between engines goes twice, on connections
    made from now on.
    """

    way: Way = "both"
    latency_s: float = 0.0
    bandwidth_bytes_s: float | None = None
    blackhole: bool = False
    corrupt_after: int | None = None
    refuse: bool = False
    repeat: bool = False


HEALTHY = Toxics()


class TcpProxy:
    """`with TcpProxy(port) as proxy:` listens on `proxy.port`. `counts` says what was done to how many.

    A target that is known later than the proxy is a function, asked at every connection.
    """

    def __init__(self, target_port: int | Callable[[], int], target_host: str = "127.0.0.1") -> None:
        self.port = 0
        self.counts: Counter[str] = Counter()
        self._host, self._target_port = target_host, target_port
        self._toxics = HEALTHY
        self._changed = asyncio.Event()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcpproxy", daemon=True)

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    @property
    def num_open(self) -> int:
        return len(self._pairs)

    def set(self, toxics: Toxics) -> None:
        """From now on; also for connections that are open."""
        self._call(self._set(toxics))

    def cut(self, *, reset: bool = False) -> int:
        """Close all open connections, with RST if asked; how many there were."""
        return self._call(self._cut(reset))

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._cut(False)
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _set(self, toxics: Toxics) -> None:
        self._toxics = toxics
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _cut(self, reset: bool) -> int:
        pairs = list(self._pairs)
        for pair in pairs:
            for writer in pair:
                if reset:
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        self.counts["reset" if reset else "cut"] += len(pairs)
        return len(pairs)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._toxics.refuse:
            self.counts["refused"] += 1
            writer.transport.abort()
            return
        try:
            target = self._target_port if isinstance(self._target_port, int) else self._target_port()
            to_reader, to_writer = await asyncio.open_connection(self._host, target)
        except OSError:
            self.counts["unreachable"] += 1
            writer.transport.abort()
            return
        self.counts["connections"] += 1
        pair = (writer, to_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                *self._way(reader, to_writer, "up"),
                *self._way(to_reader, writer, "down"),
            )
        except asyncio.CancelledError:
            # Only `_shut` cancels, and asyncio's server logs a cancelled handler as an error.
            self.counts["ended"] += 1
        finally:
            self._pairs.discard(pair)
            for one in pair:
                one.transport.abort()

    def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way
    ) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        """Reading and writing apart, so that a delay delays every byte and does not slow the stream."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        return self._take(reader, line, way), self._give(line, writer)

    async def _take(
        self, reader: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]], way: Way
    ) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            if self._toxics.repeat and self._toxics.way in ("both", way):
                await self._repeat(reader, line)
            while data := await reader.read(CHUNK_BYTES):
                data = await self._spoil(data, way, num_bytes)
                num_bytes += len(data)
                toxics = self._toxics
                delay_s = toxics.latency_s if toxics.way in ("both", way) else 0.0
                self.counts["delayed"] += delay_s > 0
                await line.put((self._loop.time() + delay_s, data))
        await line.put((self._loop.time(), b""))

    async def _repeat(self, reader: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]]) -> None:
        """To the end of the connection, or of the fault at the border of a message."""
        num_frames = 0
        with contextlib.suppress(asyncio.IncompleteReadError):
            while self._toxics.repeat or num_frames < _HANDSHAKE_FRAMES:
                header = await reader.readexactly(FRAME.size)
                frame = header + await reader.readexactly(sum(FRAME.unpack(header)[:2]))
                num_frames += 1
                times = 2 if num_frames > _HANDSHAKE_FRAMES else 1
                self.counts["repeated"] += times - 1
                for _ in range(times):
                    await line.put((self._loop.time(), frame))

    async def _give(self, line: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = await line.get()
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

    async def _spoil(self, data: bytes, way: Way, num_before: int) -> bytes:
        while self._toxics.blackhole and self._toxics.way in ("both", way):
            self.counts["held"] += 1
            await self._changed.wait()
        toxics = self._toxics
        if toxics.way not in ("both", way):
            return data
        if toxics.bandwidth_bytes_s:
            self.counts["slowed"] += 1
            await asyncio.sleep(len(data) / toxics.bandwidth_bytes_s)
        if toxics.corrupt_after is not None and num_before + len(data) > toxics.corrupt_after:
            at = max(0, toxics.corrupt_after - num_before)
            self.counts["corrupted"] += 1
            data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        return data
