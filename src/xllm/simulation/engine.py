"""A simulated engine process: the real core and its message handling on virtual time, and its faults.

One incarnation of one instance. It does what `engine/process.py` and `engine/connection.py` do with
threads and a socket; what a step computes is the core's own business.
"""

from __future__ import annotations

import asyncio
import queue

from xllm.engine.loop import HEARTBEAT_S, EngineLoop
from xllm.simulation.device import ASSETS, Device
from xllm.simulation.link import EngineEnd
from xllm.wire.messages import (
    PULSE_S,
    Attach,
    Drain,
    EngineMessage,
    Frames,
    FrontMessage,
    Hello,
    Pulse,
    Ready,
    Start,
    Stats,
)


class SimEngine:
    """`alive` = the process exists; `stopped` = it exists and does nothing (SIGSTOP).

    Frames of a step leave when its time has passed; who dies meanwhile takes them along.
    """

    def __init__(self, name: str, device: Device, end: EngineEnd) -> None:
        self.name = name
        self.device = device
        self.alive = True
        self.stopped = False
        self.exited_in_order = False
        self.failure: Exception | None = None
        self.num_steps = 0
        self._end = end
        self._loop = asyncio.get_running_loop()
        # Never blocks here: messages are handed over one by one, the queue only satisfies the type.
        inbox: queue.SimpleQueue[FrontMessage | None] = queue.SimpleQueue()
        self._handler = EngineLoop(device.core, ASSETS, inbox, self._send)
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._may_compute = asyncio.Event()
        self._may_compute.set()
        self._busy_since_s: float | None = None
        self._predicted_ms = 0.0
        self._tasks = [
            self._loop.create_task(self._run(), name=f"engine {name}"),
            self._loop.create_task(self._pulse(), name=f"pulses of {name}"),
        ]

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
        """The connection breaks; the process lives until it notices."""
        self._end.cut()

    def drain(self) -> None:
        """SIGTERM: accept nothing new, finish what runs, end."""
        self._end.inject(Drain())

    def repeat_messages(self, count: int) -> None:
        """The next `count` messages to the front arrive twice."""
        self._end.outbound.num_to_repeat = count

    async def ended(self) -> None:
        """Wait until the process is gone, whatever ended it."""
        await asyncio.wait(self._tasks)

    # -- the process ------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            self._send(Hello(incarnation=self.name))
            await self._serve()
            self.exited_in_order = True
        except Exception as error:  # noqa: BLE001 - a bug of the engine's; whoever simulates must see it
            self.failure = error
        finally:
            self._die()

    async def _serve(self) -> None:
        core = self.device.core
        ran = True
        while await self._take_messages(may_wait=not ran):
            ran, frames = core.step()
            frames = (*self._handler.take_refused(), *frames)
            snapshot = core.snapshot() if frames else None
            if ran:
                await self._take_time()
            if frames and snapshot is not None:
                self._send(Frames(frames=frames, snapshot=snapshot))
            if self._handler.draining and not core.has_requests:
                return
        core.abort_all()
        core.step()

    async def _take_time(self) -> None:
        """The step's results are known to the simulation, and to nobody else until its time has passed."""
        self.num_steps += 1
        self._predicted_ms = self.device.executor.last_step_ms / self.device.executor.slowdown
        self._busy_since_s = self._loop.time()
        await asyncio.sleep(self.device.executor.last_step_ms / 1000)
        await self._may_compute.wait()
        await self._may_run.wait()
        self._busy_since_s = None

    async def _take_messages(self, may_wait: bool) -> bool:
        """As `EngineLoop`'s: handle what has arrived, waiting for the first if nothing could run."""
        while True:
            await self._may_run.wait()
            arrived, message = self._end.take()
            if not arrived:
                if not may_wait:
                    return True
                if not await self._arrival():
                    self._send(Stats(snapshot=self.device.core.snapshot()))
                continue
            if message is None:
                return False
            self._take(message)
            may_wait = False

    async def _arrival(self) -> bool:
        """False = nothing came within a heartbeat."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._end.inbound.wait_readable()
        except TimeoutError:
            return False
        return True

    def _take(self, message: FrontMessage) -> None:
        if isinstance(message, Start | Attach):
            self._send(Ready(card=self.device.card, pid=0))
        else:
            self._handler.handle(message)

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            await self._may_run.wait()
            since_s = self._busy_since_s
            age_ms = 0.0 if since_s is None else (self._loop.time() - since_s) * 1000
            self._send(
                Pulse(
                    step=self.num_steps,
                    busy=since_s is not None,
                    step_age_ms=age_ms,
                    predicted_ms=self._predicted_ms,
                )
            )

    def _send(self, message: EngineMessage) -> None:
        self._end.send(message)

    def _die(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._end.die()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
