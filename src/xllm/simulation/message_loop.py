"""The engine's real message loop on virtual time: where it would block a thread, it awaits.

What a message means is `engine.loop.EngineLoop`'s business; only waiting and the time of a step are here.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from xllm.engine.core import EngineCore
from xllm.engine.loop import HEARTBEAT_S, EngineLoop
from xllm.engine.port import Item, Port
from xllm.simulation.link import EngineEnd
from xllm.wire.messages import WIRE_VERSION, EngineMessage, Ready


class SimInbox(queue.SimpleQueue[Item]):
    """Never waits: an engine that waits for a message does so on the virtual loop."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self.arrived = asyncio.Event()

    def put(self, item: Item, block: bool = True, timeout: float | None = None) -> None:
        self._items.append(item)
        self.arrived.set()

    def get(self, block: bool = True, timeout: float | None = None) -> Item:
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def qsize(self) -> int:
        return len(self._items)


class SimPort:
    """One front's session at the engine; a `Port`."""

    def __init__(self, number: int, end: EngineEnd) -> None:
        self.number = number
        self.version = WIRE_VERSION
        self.pulsing = False
        self.end_ = end

    def send(self, message: EngineMessage) -> None:
        self.end_.send(message)

    def took(self) -> None:
        return

    def end(self) -> None:
        self.end_.outbound.end()


LATE = 0.85
"""The next step is planned when so much of this one's time is over."""


class StepTime(Protocol):
    """The time of the oldest step under way."""

    def begin(self) -> None: ...

    async def take_time(self, ratio: float) -> None:
        """Until so much of it is over."""


class VirtualEngineLoop(EngineLoop):
    """The message loop, taken apart where it would block a thread."""

    def __init__(
        self,
        core: EngineCore,
        assets: Mapping[str, bytes],
        inbox: SimInbox,
        ready: Ready,
        parent: Port | None,
        device: StepTime,
    ) -> None:
        super().__init__(core, assets, inbox, ready, parent=parent)
        self._virtual_inbox = inbox
        self._device = device

    async def run_virtually(self, may_run: asyncio.Event) -> None:
        """`EngineLoop.run`; a step's results are there, and leave, when its time is over."""
        self._kv.tell(may_wait=False)
        ran = False
        while True:
            if not ran:
                await self._await_message(may_run)
            await may_run.wait()
            if not self._take_messages(may_wait=False):
                break
            ran = await self._turn_virtually(may_run)
            if not self._publish(ran):
                break
        self._finish()

    async def _turn_virtually(self, may_run: asyncio.Event) -> bool:
        """`EngineLoop._turn`: what a step computes is in its pages at once, and known at its end."""
        core = self._core
        self._tell_news()
        core.begin_turn()
        if not core.steps:
            core.plan()
        if core.steps:
            self._device.begin()
            if core.may_plan_ahead:
                await self._device.take_time(LATE)
                await may_run.wait()
                self._take_messages_until(0.0)
                self._tell_news()
                if core.steps:
                    core.plan()
            await self._device.take_time(1.0)
            await may_run.wait()
            if not core.steps:
                return True  # a message had it ended
        return core.collect()

    async def _await_message(self, may_run: asyncio.Event) -> None:
        """Until there is one; on each heartbeat without one the fronts are told that nothing happens."""
        self._core.progress.busy = False
        inbox = self._virtual_inbox
        while not inbox.qsize():
            inbox.arrived.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await inbox.arrived.wait()
            except TimeoutError:
                await may_run.wait()
                self._tell_all(self._fronts.values())
                if self._drain_end_s is not None or self._core.mover.is_waiting:
                    return
