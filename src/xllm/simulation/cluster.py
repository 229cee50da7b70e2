"""One front and k simulated engines on one virtual loop: what policies are compared on and faults hit.

Composition and the doings of an operating system, a supervisor and a network: start, kill, restart,
connect again. No request and no fault is made here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from xllm.config import EngineConfig, FrontConfig, SchedulerConfig
from xllm.cost import StepCost
from xllm.errors import UnavailableError
from xllm.service.front import Front
from xllm.service.instances.about import InstanceAbout
from xllm.service.instances.handshake import attach, start_engine
from xllm.service.router.base import RouterPolicy
from xllm.service.snapshot import FrontObserver
from xllm.simulation.clock import VirtualClock
from xllm.simulation.device import FULL, MAX_MODEL_LEN, SMOLLM2_ON_TWO_CORES, Draws, build_device
from xllm.simulation.engine import SimEngine
from xllm.simulation.network import Network, Wire
from xllm.types import KVGroup, Phase

START_TIMEOUT_S = 20.0
RETRY_S = 0.25
"""Between two tries to start or to reach an instance."""
RESTART_S = 0.5
"""A supervisor's pause when no fault says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What every instance of the cluster is like."""

    num_pages: int = 64
    groups: tuple[KVGroup, ...] = (FULL,)
    scheduler: SchedulerConfig = SchedulerConfig()
    step_time: StepCost = SMOLLM2_ON_TWO_CORES
    servers: bool = False
    max_model_len: int = MAX_MODEL_LEN
    page_bytes: int = 0
    exact: bool = True


def ignore_change(name: str, up: bool) -> None:
    """For those who do not care when an instance came or went."""


class SimCluster:
    """Create it inside a running VirtualLoop; `close` it at the end.

    `engines` holds the latest process of each name, `processes` all there ever were. `on_change(name,
    up)` tells when the front has taken an instance or lost it. `restart_s` by name: None = it stays away.
    `phases` by name is the role that an instance starts with; mixed unless said. Without a `wire` engines
    exchange no pages.
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
        on_change: Callable[[str, bool], None] = ignore_change,
        wire: Wire | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.clock = VirtualClock(self._loop)
        self.network = None if wire is None else Network(wire)
        self.front = Front(config, router, self.clock, observer=observer)
        self.engines: dict[str, SimEngine] = {}
        self.processes: list[SimEngine] = []
        self.restart_s: dict[str, float | None] = {}
        self.phases: dict[str, tuple[Phase, ...]] = {}
        self._shape = shape
        self._rng = rng
        self._latency_s = latency_s
        self._extra_latency_s: dict[str, float] = {}
        self._draws = draws if draws is not None else Draws()
        self._on_change = on_change
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def add(self, name: str) -> bool:
        """Start a process if none lives, and let the front have it; False when that failed this time."""
        engine = self.engines.get(name)
        if engine is None or not engine.alive:
            engine = self._start(name)
        stream = engine.connect()
        try:
            if engine.server:
                ready = await attach(stream)
            else:
                ready = await start_engine(stream, EngineConfig(), timeout_s=START_TIMEOUT_S)
            await self.front.add_instance(
                stream,
                ready,
                name=name,
                on_lost=lambda: self._lost(name),
                about=InstanceAbout(
                    address="simulated" if engine.server else "local",
                    pulses=True,
                    phases=self.phases.get(name, ("prefill", "decode")),
                    endpoints=ready.endpoints,
                ),
                cause_of=None if engine.server else lambda: self._cause(engine),
                on_hung=None if engine.server else engine.crash,
            )
        except (UnavailableError, ValueError):
            # ValueError: the front still has the old connection under that name.
            await stream.close()
            return False
        self._on_change(name, True)
        return True

    def delay(self, name: str, seconds: float) -> None:
        """Messages of the instance's connection take this much longer from now on."""
        self._extra_latency_s[name] = seconds

    async def close(self) -> None:
        """End the front, then wait until every process that still lives has noticed and ended."""
        self._closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.front.close()
        for engine in self.processes:
            engine.shut_down()
            await engine.ended()

    # -- inside -----------------------------------------------------------------------------------

    def _start(self, name: str) -> SimEngine:
        def latency_s() -> float:
            return self._latency_s * self._rng.uniform(0.5, 1.5) + self._extra_latency_s.get(name, 0.0)

        device = build_device(
            self.clock,
            self._draws,
            num_pages=self._shape.num_pages,
            groups=self._shape.groups,
            config=self._shape.scheduler,
            step_time=self._shape.step_time,
            max_model_len=self._shape.max_model_len,
            page_bytes=self._shape.page_bytes,
            exact=self._shape.exact,
        )
        engine = SimEngine(
            f"{name}/{len(self.processes)}",
            device,
            latency_s,
            server=self._shape.servers,
            network=self.network,
        )
        self.engines[name] = engine
        self.processes.append(engine)
        return engine

    def _cause(self, engine: SimEngine) -> str:
        """What a supervisor finds out by waiting for the process or looking at it."""
        if engine.died_of_request or engine.failure is not None:
            return "crash"
        if engine.stopped:
            return "stopped"
        return "hang" if engine.alive else "killed"

    def _lost(self, name: str) -> None:
        self._on_change(name, False)
        engine = self.engines[name]
        if not engine.server:
            engine.crash()  # a supervisor leaves no process behind that nobody speaks to
        pause_s = self.restart_s.get(name, RESTART_S)
        if pause_s is not None and not self._closing:
            task = self._loop.create_task(self._return(name, pause_s), name=f"return of {name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _return(self, name: str, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        while not await self.add(name):
            await asyncio.sleep(RETRY_S)
