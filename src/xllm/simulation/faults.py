"""Carries out the faults of a schedule on a cluster, at their time, and undoes them at theirs.

It draws nothing and judges nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from xllm.simulation.cluster import RESTART_S, SimCluster
from xllm.simulation.engine import SimEngine
from xllm.simulation.network import LinkFault, LinkFaultKind
from xllm.simulation.record import Timeline
from xllm.simulation.schedule import LINK_KINDS, Fault, FaultKind

SLOW_IS_UNUSABLE = 4.0
"""A step that takes this many times its prediction may be taken for a hang."""


_LINK_FAULTS: dict[str, LinkFaultKind] = {
    "link_cut": "cut",
    "link_stall": "stall",
    "link_mute": "stall_answers",
    "link_corrupt": "corrupt",
    "link_slow": "slow",
    "link_repeat": "repeat",
}
_AT_AN_END: dict[str, tuple[FaultKind, bool]] = {
    "crash_sender": ("crash", True),
    "crash_receiver": ("crash", False),
    "stop_sender": ("stop", True),
    "stop_receiver": ("stop", False),
}
"""What happens to which end of a transfer; True = to the sender."""


class FaultPlayer:
    """`num_hit` counts faults that met a living process; others find nothing to hurt. `tasks` play those that
    a transfer set off."""

    def __init__(
        self, cluster: SimCluster, timeline: Timeline, origin_s: float, log: Callable[..., None]
    ) -> None:
        self.num_hit = 0
        self.tasks: list[asyncio.Task[None]] = []
        self._timeline = timeline
        self._cluster = cluster
        self._origin_s = origin_s
        self._log = log
        self._loop = asyncio.get_running_loop()

    async def start(self, name: str, at_s: float) -> None:
        """Bring the instance into the cluster at its time."""
        await asyncio.sleep(self._origin_s + at_s - self._loop.time())
        await self._cluster.add(name)

    async def play(self, fault: Fault, name: str) -> None:
        await asyncio.sleep(self._origin_s + fault.at_s - self._loop.time())
        if fault.kind == "wall_jump":
            self._cluster.clock.jump_wall(fault.amount)
            return
        engine = self._cluster.engines.get(name)
        if engine is None or not engine.alive:
            return
        if fault.kind in LINK_KINDS:
            self._log(fault.kind, name, fault.amount)
            self._spoil_link(fault, engine)
            return
        self.num_hit += 1
        self._log(fault.kind, name)
        self._timeline.fault(name, self._loop.time(), fault.kind, fault.lasts_s)
        await self._inflict(fault, name, engine)

    def _spoil_link(self, fault: Fault, engine: SimEngine) -> None:
        """No excuse for anything: a transfer that fails is no fault that a client may notice."""
        network = self._cluster.network
        if network is None:
            return
        if fault.kind == "part":
            others = sorted(other.endpoint for other in self._cluster.engines.values() if other is not engine)
            if others:
                network.part(engine.endpoint, others[fault.instance % len(others)], fault.lasts_s or 0.0)
            return
        planned = LinkFault(
            kind=_LINK_FAULTS.get(fault.kind, "call"),
            fraction=min(fault.amount, 1.0),
            lasts_s=fault.lasts_s or 0.0,
            call=partial(self._strike, fault),
        )
        network.plan(planned)

    def _strike(self, fault: Fault, sender: str, receiver: str) -> None:
        """The transfer has come so far that one of its ends is to be hit."""
        kind, of_sender = _AT_AN_END[fault.kind]
        endpoint = sender if of_sender else receiver
        name = next((n for n, e in self._cluster.engines.items() if e.endpoint == endpoint), None)
        if name is not None:
            at_s = self._loop.time() - self._origin_s + max(0.0, fault.amount - 1.0)
            struck = replace(fault, kind=kind, at_s=at_s, amount=0.0)
            self.tasks.append(self._loop.create_task(self.play(struck, name), name="fault"))

    async def _inflict(self, fault: Fault, name: str, engine: SimEngine) -> None:
        cluster = self._cluster
        match fault.kind:
            case "crash" | "cut" | "drain":
                cluster.restart_s[name] = fault.lasts_s
                {"crash": engine.crash, "cut": engine.cut, "drain": engine.drain}[fault.kind]()
                # The next loss, if one follows, is nobody's plan.
                await engine.ended() if fault.kind != "cut" else await asyncio.sleep(RESTART_S)
                if fault.lasts_s is not None:
                    cluster.restart_s.pop(name, None)
            case "stop":
                await self._while(fault, name, engine.stop, engine.resume)
            case "hang":
                await self._while(fault, name, engine.hang_device, engine.release_device)
            case "slow":
                bad = fault.amount >= SLOW_IS_UNUSABLE
                slow, usual = (lambda: engine.slow_down(fault.amount)), (lambda: engine.slow_down(1.0))
                await self._while(fault, name, slow, usual, unusable=bad)
            case "delay":
                late, usual = (lambda: cluster.delay(name, fault.amount)), (lambda: cluster.delay(name, 0.0))
                await self._while(fault, name, late, usual)
            case "repeat":
                engine.repeat_messages(int(fault.amount))
            case _:
                return

    async def _while(
        self,
        fault: Fault,
        name: str,
        begin: Callable[[], None],
        end: Callable[[], None],
        *,
        unusable: bool = True,
    ) -> None:
        if unusable:
            self._timeline.bad(name, self._loop.time(), 1)
        begin()
        await asyncio.sleep(fault.lasts_s or 0.0)
        self._log("end", fault.kind, name)
        end()
        if unusable:
            self._timeline.bad(name, self._loop.time(), -1)
