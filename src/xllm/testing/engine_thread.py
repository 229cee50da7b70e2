"""A real engine core in a thread, behind the same messages a process would speak.

Every message is encoded and decoded on its way, so what works here works over a socket.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping

from xllm.engine.core import EngineCore
from xllm.engine.loop import EngineLoop
from xllm.engine.port import Inbox
from xllm.wire.codec import HEADER, decode_engine, decode_front, encode
from xllm.wire.messages import WIRE_VERSION, Attach, EngineMessage, FrontMessage, Hello, Ready, Start


class _ThreadPort:
    """The step thread's end of the stream."""

    number = 0
    version = WIRE_VERSION
    pulsing = False

    def __init__(self, deliver: Callable[[EngineMessage | None], None]) -> None:
        self.send = deliver

    def took(self) -> None:
        return

    def end(self) -> None:
        self.send(None)


class ThreadedEngineStream:
    """An `EngineStream` to a core that runs in a thread of this process.

    Create it inside a running event loop. `close()` is what a front's death looks like to the core.
    """

    def __init__(self, core: EngineCore, assets: Mapping[str, bytes]) -> None:
        self.core = core
        self._inbox: Inbox = queue.SimpleQueue()
        self._out: asyncio.Queue[EngineMessage | None] = asyncio.Queue()
        self._event_loop = asyncio.get_running_loop()
        self._port = _ThreadPort(self._deliver)
        self._ready = Ready(card=core.card, pid=0)
        self._loop = EngineLoop(core, assets, self._inbox, self._ready, parent=self._port)
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        self._closed = False

    async def send(self, message: FrontMessage) -> None:
        if self._closed or (self._thread.ident is not None and not self._thread.is_alive()):
            raise ConnectionResetError("the engine is gone")
        message = decode_front(encode(message)[HEADER.size :])
        match message:
            case Hello():
                self._deliver(Hello(incarnation="thread"))
            case Start() | Attach():
                self._deliver(self._ready)
                self._thread.start()
            case _:
                self._inbox.put((self._port, message))

    async def receive(self) -> EngineMessage | None:
        return None if self._closed else await self._out.get()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.put((self._port, None))
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, 10.0)
        self._out.put_nowait(None)

    def _run(self) -> None:
        try:
            self._loop.run()
        finally:
            self._deliver(None)

    def _deliver(self, message: EngineMessage | None) -> None:
        if message is not None:
            message = decode_engine(encode(message)[HEADER.size :])
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(self._out.put_nowait, message)
