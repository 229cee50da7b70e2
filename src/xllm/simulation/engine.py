"""A simulated engine process: the real core and the real message loop on virtual time, and its faults.

One process of one instance. It does what `engine/process.py`, `engine/server.py` and `engine/hub.py` do
with threads and sockets; what a message means and what a step computes is the real code's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xllm.engine.hub import pulse_of
from xllm.simulation.device import ASSETS, Device, DeviceLostError
from xllm.simulation.link import SimStream, connect
from xllm.simulation.message_loop import SimInbox, SimPort, VirtualEngineLoop
from xllm.simulation.network import Network
from xllm.simulation.step_transfers import StepTransfers
from xllm.simulation.transfers import SimTransfers
from xllm.wire.messages import (
    PULSE_S,
    Attach,
    Drain,
    Hello,
    Ready,
    Start,
)


class SimEngine:
    """`alive` = the process exists; `stopped` = it exists and does nothing (SIGSTOP).

    Frames of a step leave when its time has passed; who dies meanwhile takes them along. A `server`
    outlives its connections; otherwise the process belongs to its first one.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        latency_s: Callable[[], float],
        *,
        server: bool,
        network: Network | None = None,
    ) -> None:
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
        self._step_s = (0.0, 0.0)
        self._tasks: list[asyncio.Task[None]] = []
        self._main: asyncio.Task[None] | None = None
        self._transfers = None if network is None else self._data_plane(network)
        if self._transfers is not None:
            device.core.join(self._transfers)
        if server:
            self._begin(None)

    @property
    def endpoint(self) -> str:
        return f"sim:{self.name}"

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
        endpoints = () if self._transfers is None else self._transfers.endpoints
        ready = Ready(card=device.card, pid=0, max_reqs=device.max_reqs, endpoints=endpoints)
        try:
            if parent is not None:
                parent.send(ready)
            loop = VirtualEngineLoop(device.core, ASSETS, self._inbox, ready, parent, self)
            await loop.run_virtually(self._may_run)
            self.exited_in_order = True
        except DeviceLostError:
            self.died_of_request = True
        except Exception as error:  # noqa: BLE001 - a bug of the engine's; whoever simulates must see it
            self.failure = error
        finally:
            self._die()

    def _data_plane(self, network: Network) -> StepTransfers:
        """As of a process: it stops and dies with it, and goes on while the step thread hangs."""
        device = self.device
        transfers = SimTransfers(
            network,
            self.endpoint,
            device.kv,
            page_bytes=(device.card.page_bytes // len(device.kv),) * len(device.kv),
            compatible=f"{device.card.numerics_class} {device.card.kv_layout_digest}",
            tell=lambda event: self._inbox.put((None, event)),
            may_run=self._may_run.wait,
            spawn=self._spawn,
        )
        return StepTransfers(transfers, may_run=self._may_run.wait, spawn=self._spawn)

    def begin(self) -> None:
        executor = self.device.executor
        executor.begin()
        seconds = executor.last_step_ms / 1000
        self._step_s = (self._loop.time(), seconds)
        if self._transfers is not None:
            self._transfers.step_takes(seconds)

    async def take_time(self, ratio: float) -> None:
        began_s, seconds = self._step_s
        await asyncio.sleep(max(0.0, began_s + ratio * seconds - self._loop.time()))
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
        if self._transfers is not None:
            self._transfers.close()
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
