"""A simulated engine process: the real core and the real message loop on virtual time, and its faults.

One process of one instance. It does what `engine/process.py`, `engine/server.py` and `engine/hub.py` do
with threads and sockets; what a message means and what a step computes is the real code's business.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from xllm.engine.core import EngineCore
from xllm.engine.hub import pulse_of
from xllm.engine.loop import HEARTBEAT_S, EngineLoop
from xllm.engine.port import Item, Port
from xllm.simulation.device import ASSETS, Device, DeviceLostError
from xllm.simulation.link import EngineEnd, SimStream, connect
from xllm.wire.messages import (
    PULSE_S,
    WIRE_VERSION,
    Attach,
    Drain,
    EngineMessage,
    Hello,
    Ready,
    Start,
)


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


class VirtualEngineLoop(EngineLoop):
    """The message loop, taken apart where it would block a thread."""

    def __init__(
        self,
        core: EngineCore,
        assets: Mapping[str, bytes],
        inbox: SimInbox,
        ready: Ready,
        parent: Port | None,
    ) -> None:
        super().__init__(core, assets, inbox, ready, parent=parent)
        self._virtual_inbox = inbox

    async def run_virtually(self, may_run: asyncio.Event, take_time: Callable[[], Awaitable[None]]) -> None:
        """`EngineLoop.run`; a step's results leave when `take_time` is over."""
        self._kv.tell(may_wait=False)
        ran = False
        while True:
            if not ran:
                await self._await_message(may_run)
            await may_run.wait()
            if not self._take_messages(may_wait=False):
                break
            ran = self._core.advance()
            if ran:
                await take_time()
                await may_run.wait()
            if not self._publish(ran):
                break
        self._finish()

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
                if self._drain_end_s is not None:
                    return


class SimEngine:
    """`alive` = the process exists; `stopped` = it exists and does nothing (SIGSTOP).

    Frames of a step leave when its time has passed; who dies meanwhile takes them along. A `server`
    outlives its connections; otherwise the process belongs to its first one.
    """

    def __init__(self, name: str, device: Device, latency_s: Callable[[], float], *, server: bool) -> None:
        self.name = name
        self.device = device
        self.alive = True
        self.stopped = False
        self.exited_in_order = False
        self.died_of_request = False
        self.failure: Exception | None = None
        self.server = server
        self._latency_s = latency_s
        self._loop = asyncio.get_running_loop()
        self._inbox = SimInbox()
        self._ports: list[SimPort] = []
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._may_compute = asyncio.Event()
        self._may_compute.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._main: asyncio.Task[None] | None = None
        if server:
            self._begin(None)

    def connect(self) -> SimStream:
        """A new connection of a front."""
        stream, end = connect(self._loop, self._latency_s)
        port = SimPort(len(self._ports), end)
        self._ports.append(port)
        self._spawn(self._read(port), f"reader {port.number} of {self.name}")
        return stream

    # -- faults ---------------------------------------------------------------------------------

    def crash(self) -> None:
        """kill -9: nothing is finished, nothing is said."""
        self._die()

    def stop(self) -> None:
        """SIGSTOP: the connection stays, nothing moves."""
        self.stopped = True
        self._may_run.clear()

    def resume(self) -> None:
        """SIGCONT: goes on exactly where it was, whatever happened meanwhile."""
        self.stopped = False
        self._may_run.set()

    def hang_device(self) -> None:
        """The step thread sits in a step that does not end; the I/O thread lives."""
        self._may_compute.clear()

    def release_device(self) -> None:
        self._may_compute.set()

    def slow_down(self, factor: float) -> None:
        self.device.executor.slowdown = factor

    def cut(self) -> None:
        """All connections break; the process lives until it notices, or on as a server."""
        for port in self._ports:
            port.end_.cut()

    def drain(self) -> None:
        """SIGTERM: accept nothing new, finish what runs, end."""
        self._inbox.put((None, Drain()))

    def shut_down(self) -> None:
        """End after the step that runs."""
        self.resume()
        self.release_device()
        self._inbox.put((None, None))

    def repeat_messages(self, count: int) -> None:
        """The next `count` messages to each front arrive twice."""
        for port in self._ports:
            port.end_.outbound.num_to_repeat = count

    async def ended(self) -> None:
        """Wait until the process is gone, whatever ended it."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # -- the process ------------------------------------------------------------------------------

    def _begin(self, parent: SimPort | None) -> None:
        self._main = self._spawn(self._run(parent), f"engine {self.name}")
        self._spawn(self._pulse(), f"pulses of {self.name}")

    async def _run(self, parent: SimPort | None) -> None:
        device = self.device
        ready = Ready(card=device.card, pid=0, max_reqs=device.max_reqs)
        try:
            if parent is not None:
                parent.send(ready)
            loop = VirtualEngineLoop(device.core, ASSETS, self._inbox, ready, parent)
            await loop.run_virtually(self._may_run, self._take_time)
            self.exited_in_order = True
        except DeviceLostError:
            self.died_of_request = True
        except Exception as error:  # noqa: BLE001 - a bug of the engine's; whoever simulates must see it
            self.failure = error
        finally:
            self._die()

    async def _take_time(self) -> None:
        await asyncio.sleep(self.device.executor.last_step_ms / 1000)
        await self._may_compute.wait()

    async def _read(self, port: SimPort) -> None:
        """The I/O thread's part for one connection."""
        while True:
            await port.end_.inbound.wait_readable()
            await self._may_run.wait()
            arrived, message = port.end_.take()
            if not arrived:
                continue
            if message is None:
                port.pulsing = False
                port.end_.outbound.end()
                self._inbox.put((port, None))
                if self._main is None:
                    self._die()
                return
            if isinstance(message, Hello):
                port.send(Hello(incarnation=self.name))
            elif isinstance(message, Start) and self._main is None:
                self._begin(port)
            elif isinstance(message, Attach) or self._main is not None:
                self._inbox.put((port, message))

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            await self._may_run.wait()
            for port in self._ports:
                if port.pulsing:
                    port.send(pulse_of(self.device.core.progress, self._loop.time()))

    def _die(self) -> None:
        if not self.alive:
            return
        self.alive = False
        for port in self._ports:
            port.end_.die()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _spawn(self, work: object, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work, name=name)  # type: ignore[arg-type]
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)
        return task
