"""Carries out the faults of a schedule on a cluster, at their time, and undoes them at theirs.

It keeps the books of when an instance was usable; it draws nothing and judges nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xllm.simulation.cluster import SimCluster
from xllm.simulation.engine import SimEngine
from xllm.simulation.record import Usable
from xllm.simulation.schedule import Fault

SLOW_IS_UNUSABLE = 4.0
"""A step that takes this many times its prediction may be taken for a hang."""


class FaultPlayer:
    """`num_hit` counts faults that met a living process; others find nothing to hurt."""

    def __init__(self, cluster: SimCluster, origin_s: float, log: Callable[..., None]) -> None:
        self.usable = Usable()
        self.num_hit = 0
        self.num_losses = 0
        self._cluster = cluster
        self._origin_s = origin_s
        self._log = log
        self._loop = asyncio.get_running_loop()

    async def start(self, name: str, at_s: float) -> None:
        """Bring the instance into the cluster at its time."""
        await asyncio.sleep(self._origin_s + at_s - self._loop.time())
        self._log("start", name)
        if await self._cluster.add(name):
            self.note(name, usable=True)

    async def play(self, fault: Fault, name: str) -> None:
        await asyncio.sleep(self._origin_s + fault.at_s - self._loop.time())
        if fault.kind == "wall_jump":
            self._log(fault.kind)
            self._cluster.clock.jump_wall(fault.amount)
            return
        engine = self._cluster.engines.get(name)
        if engine is None or not engine.alive:
            return
        self.num_hit += 1
        self._log(fault.kind, name)
        await self._inflict(fault, name, engine)

    def note(self, name: str, *, usable: bool) -> None:
        self.usable.note(name, self._loop.time(), usable)

    async def _inflict(self, fault: Fault, name: str, engine: SimEngine) -> None:
        match fault.kind:
            case "crash":
                self._lose(fault, name)
                engine.crash()
            case "cut":
                self._lose(fault, name)
                engine.cut()
            case "drain":
                self._lose(fault, name)
                engine.drain()
            case "stop":
                await self._while(fault, name, engine, engine.stop, engine.resume)
            case "hang":
                await self._while(fault, name, engine, engine.hang_device, engine.release_device)
            case "slow":
                bad = fault.amount >= SLOW_IS_UNUSABLE
                await self._while(
                    fault,
                    name,
                    engine,
                    lambda: engine.slow_down(fault.amount),
                    lambda: engine.slow_down(1.0),
                    unusable=bad,
                )
            case "delay":
                await self._while(
                    fault,
                    name,
                    engine,
                    lambda: self._cluster.delay(name, fault.amount),
                    lambda: self._cluster.delay(name, 0.0),
                )
            case "repeat":
                engine.repeat_messages(int(fault.amount))
            case _:
                return

    def _lose(self, fault: Fault, name: str) -> None:
        self.num_losses += 1
        self.note(name, usable=False)
        if fault.lasts_s is not None:
            self._cluster.restart_later(name, fault.lasts_s, lambda: self.note(name, usable=True))

    async def _while(
        self,
        fault: Fault,
        name: str,
        engine: SimEngine,
        begin: Callable[[], None],
        end: Callable[[], None],
        *,
        unusable: bool = True,
    ) -> None:
        if unusable:
            self.note(name, usable=False)
        begin()
        await asyncio.sleep(fault.lasts_s or 0.0)
        self._log("end", fault.kind, name)
        end()
        if unusable and engine.alive and self._cluster.engines.get(name) is engine:
            self.note(name, usable=True)
