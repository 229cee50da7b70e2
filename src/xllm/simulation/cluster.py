"""One front and k simulated engines on one virtual loop: what policies are compared on and faults hit.

Composition and the doings of an operating system and a supervisor (start, kill, restart); no request
and no random number is made here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from xllm.config import EngineConfig, FrontConfig, SchedulerConfig
from xllm.errors import UnavailableError
from xllm.service.front import Front
from xllm.service.instances.handshake import start_engine
from xllm.service.router.base import RouterPolicy
from xllm.service.snapshot import FrontObserver
from xllm.simulation.clock import VirtualClock
from xllm.simulation.device import FULL, Draws, LinearStepTime, StepTime, build_device
from xllm.simulation.engine import SimEngine
from xllm.simulation.link import connect
from xllm.types import KVGroup

START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What every instance of the cluster is like."""

    num_pages: int = 64
    groups: tuple[KVGroup, ...] = (FULL,)
    scheduler: SchedulerConfig = SchedulerConfig()
    step_time: StepTime = LinearStepTime()


class SimCluster:
    """Create it inside a running VirtualLoop; `close` it at the end.

    `engines` holds the latest incarnation of each name, `incarnations` all there ever were.
    """

    def __init__(
        self,
        config: FrontConfig,
        shape: EngineShape,
        *,
        rng: random.Random,
        router: RouterPolicy | None = None,
        observer: FrontObserver | None = None,
        latency_s: float = 0.0001,
        draws: Draws | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.clock = VirtualClock(self._loop)
        self.front = Front(config, router, self.clock, observer=observer)
        self.engines: dict[str, SimEngine] = {}
        self.incarnations: list[SimEngine] = []
        self._shape = shape
        self._rng = rng
        self._latency_s = latency_s
        self._extra_latency_s: dict[str, float] = {}
        self._draws = draws if draws is not None else Draws()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def add(self, name: str) -> bool:
        """Start a process and let the front have it; False when it died before it was ready."""

        def latency_s() -> float:
            return self._latency_s * self._rng.uniform(0.5, 1.5) + self._extra_latency_s.get(name, 0.0)

        device = build_device(
            self.clock,
            self._draws,
            num_pages=self._shape.num_pages,
            groups=self._shape.groups,
            config=self._shape.scheduler,
            step_time=self._shape.step_time,
        )
        stream, end = connect(self._loop, latency_s)
        engine = SimEngine(f"{name}/{len(self.incarnations)}", device, end)
        self.engines[name] = engine
        self.incarnations.append(engine)
        scheduler = self._shape.scheduler
        try:
            ready = await start_engine(stream, EngineConfig(), timeout_s=START_TIMEOUT_S)
            await self.front.add_instance(
                stream,
                ready.card,
                name=name,
                max_reqs=scheduler.max_num_seqs + scheduler.max_num_queued_reqs,
            )
        except UnavailableError:
            await stream.close()
            return False
        return True

    # -- what a supervisor does ---------------------------------------------------------------------

    def restart_later(
        self, name: str, seconds: float, on_started: Callable[[], None] = lambda: None
    ) -> None:
        """A new process under the name, once the old one has gone."""

        async def restart() -> None:
            await self.engines[name].ended()
            await asyncio.sleep(seconds)
            while not self._closing and not await self._added(name):
                await asyncio.sleep(0.1)
            on_started()

        self._background(restart(), f"restart of {name}")

    async def _added(self, name: str) -> bool:
        try:
            return await self.add(name)
        except ValueError:
            # The front still holds the old incarnation's connection.
            self.engines[name].crash()
            return False

    def delay(self, name: str, seconds: float) -> None:
        """Messages of the instance's connection take this much longer from now on."""
        self._extra_latency_s[name] = seconds

    async def close(self) -> None:
        """End the front, then wait until every engine that still lives has noticed and ended."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.front.close()
        for engine in self.incarnations:
            engine.resume()
            engine.release_device()
            await engine.ended()

    def _background(self, work: object, name: str) -> None:
        task = self._loop.create_task(work, name=name)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
