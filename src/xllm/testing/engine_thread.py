"""A real engine core in a thread, behind the same messages a process would speak.

Every message is encoded and decoded on its way, so what works here works over a socket.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Mapping

from xllm.engine.core import EngineCore
from xllm.engine.loop import EngineLoop
from xllm.wire.codec import HEADER, decode_engine, decode_front, encode
from xllm.wire.messages import EngineMessage, FrontMessage, Hello, Ready, Start


class ThreadedEngineStream:
    """An `EngineStream` to a core that runs in a thread of this process.

    Create it inside a running event loop. `close()` is what a front's death looks like to the core.
    """

    def __init__(self, core: EngineCore, assets: Mapping[str, bytes]) -> None:
        self.core = core
        self._inbox: queue.SimpleQueue[FrontMessage | None] = queue.SimpleQueue()
        self._out: asyncio.Queue[EngineMessage | None] = asyncio.Queue()
        self._event_loop = asyncio.get_running_loop()
        self._loop = EngineLoop(core, assets, self._inbox, self._deliver)
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        self._closed = False

    async def send(self, message: FrontMessage) -> None:
        if self._closed or (self._thread.ident is not None and not self._thread.is_alive()):
            raise ConnectionResetError("the engine is gone")
        message = decode_front(encode(message)[HEADER.size :])
        match message:
            case Hello():
                self._deliver(Hello(incarnation="thread"))
            case Start():
                self._deliver(Ready(card=self.core.card, pid=0))
                self._thread.start()
            case _:
                self._inbox.put(message)

    async def receive(self) -> EngineMessage | None:
        return None if self._closed else await self._out.get()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.put(None)
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
