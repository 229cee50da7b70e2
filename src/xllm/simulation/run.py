"""Runs one schedule from beginning to quiet, and says what was wrong with it.

Everything is made anew for each run; what is drawn comes from the schedule's seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm import ids
from xllm.config.instances import ROLES, phases_in_order
from xllm.errors import XllmError
from xllm.service.router.base import RouterPolicy
from xllm.service.router.registry import load_policy
from xllm.simulation.client import Client, Outcome
from xllm.simulation.cluster import EngineShape, SimCluster
from xllm.simulation.device import Draws
from xllm.simulation.faults import FaultPlayer
from xllm.simulation.golden import golden_output
from xllm.simulation.hand_over import PAGE_BYTES, SimSwitch, elsewhere
from xllm.simulation.leftovers import held, index_faults, quiet
from xllm.simulation.loop import StuckError, run_virtual
from xllm.simulation.oracle import judge
from xllm.simulation.record import Observer, Record, Timeline
from xllm.simulation.schedule import Schedule, make_schedule

END_AFTER_S = 400.0
"""Virtual seconds after the schedule's last event within which every request must have ended."""
HEAD_START_S = 0.5
"""Instances that start at 0 have this long before the first request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`wrong` is empty for a good run. `digest` is of everything that happened, with its times."""

    seed: int
    wrong: tuple[str, ...]
    digest: str
    num_requests: int
    num_faults_hit: int
    num_completed: int
    num_losses: int
    virtual_s: float
    error_codes: tuple[str, ...] = ()
    gaps_s: tuple[float, ...] = ()
    handovers: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_switches: int = 0
    num_claimed_rows: int = 0
    num_link_faults_hit: int = 0


class EventLog:
    """Everything that happened, in order. Equal digests = equal runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, keep: bool = False) -> None:
        self._loop = loop
        self._hash = hashlib.sha256()
        self.lines: list[str] | None = [] if keep else None

    def __call__(self, *fields: object) -> None:
        line = f"{self._loop.time():.6f} {' '.join(map(repr, fields))}"
        self._hash.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    def digest(self) -> str:
        return self._hash.hexdigest()


def run_seed(seed: int) -> Report:
    return run_schedule(make_schedule(seed))


def run_schedule(schedule: Schedule, on_line: Callable[[str], None] | None = None) -> Report:
    """Run it on a fresh virtual loop. `on_line` gets the event log afterwards."""
    rng = random.Random(schedule.seed ^ 0x5EED)
    with ids.predictable(rng.getrandbits):
        try:
            return run_virtual(_Run(schedule, rng, on_line).run())
        except StuckError as error:
            return _stuck(schedule, str(error))


class _Run:
    def __init__(self, schedule: Schedule, rng: random.Random, on_line: Callable[[str], None] | None) -> None:
        self._schedule = schedule
        self._rng = rng
        self._on_line = on_line
        self._draws = Draws()

    async def run(self) -> Report:
        schedule, hand_overs = self._schedule, self._schedule.hand_overs
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        origin_s = begun_s + HEAD_START_S
        log = EventLog(loop, keep=self._on_line is not None)
        observer = Observer(log, loop.time)
        shape = EngineShape(
            num_pages=schedule.num_pages,
            groups=schedule.groups,
            scheduler=schedule.scheduler,
            step_time=schedule.step_time,
            servers=schedule.servers,
            page_bytes=0 if hand_overs is None else PAGE_BYTES,
        )
        timeline = Timeline()

        def on_change(name: str, up: bool) -> None:
            log("up" if up else "down", name)
            timeline.up(name, loop.time(), up)

        cluster = SimCluster(
            schedule.front,
            shape,
            rng=self._rng,
            observer=observer,
            latency_s=schedule.latency_s,
            draws=self._draws,
            on_change=on_change,
            router=_router(schedule),
            wire=None if hand_overs is None else hand_overs.wire,
        )
        switches: tuple[SimSwitch, ...] = ()
        if hand_overs is not None:
            switches = hand_overs.switches
            cluster.phases = {
                f"engine-{i}": phases_in_order(ROLES[role]) for i, role in enumerate(hand_overs.roles)
            }
        player = FaultPlayer(cluster, timeline, origin_s, log)
        names = [f"engine-{i}" for i in range(len(schedule.starts_s))]
        movers = [_mover(cluster, schedule, i, names, log) for i in range(len(schedule.requests))]
        clients = [
            Client(i, r, cluster.front, origin_s, mover)
            for i, (r, mover) in enumerate(zip(schedule.requests, movers, strict=True))
        ]
        starts = [player.start(n, at - HEAD_START_S) for n, at in zip(names, schedule.starts_s, strict=True)]
        faults = [player.play(f, names[f.instance]) for f in schedule.faults]
        roles = [_switch(cluster, s, names[s.instance], origin_s, log) for s in switches]
        side = [loop.create_task(w, name="fault") for w in (*starts, *faults, *roles)]
        readers = [loop.create_task(c.run(), name=f"client {i}") for i, c in enumerate(clients)]
        await asyncio.sleep(schedule.last_event_s)
        await asyncio.wait(readers, timeout=END_AFTER_S)
        failures = [str(t.exception()) for t in readers if t.done() and t.exception() is not None]
        side += player.tasks
        failures += [repr(t.exception()) for t in side if t.done() and t.exception() is not None]
        engine_faults = [*await quiet(cluster), *index_faults(cluster)]
        record = Record(
            outcomes=[c.outcome for c in clients],
            front=cluster.front.snapshot(),
            num_ended=observer.num_ended,
            golden=lambda spec: golden_output(spec, schedule.groups, self._draws),
            engine_faults=engine_faults,
            timeline=timeline,
            detections=observer.detections,
            ended_s=loop.time(),
            may_be_full=_may_be_full(schedule),
            recovery_grace_s=schedule.front.recovery_grace_s,
        )
        wrong = [*failures, *judge(record)]
        for task in (*readers, *side):
            task.cancel()
        await cluster.close()
        wrong += [f"{e.name} after its end: {what}" for e in cluster.processes for what in held(e)]
        if self._on_line is not None:
            for line in log.lines or ():
                self._on_line(line)
        return Report(
            seed=schedule.seed,
            wrong=tuple(wrong),
            digest=log.digest(),
            num_requests=len(clients),
            num_faults_hit=player.num_hit,
            num_completed=sum(o.error is None and o.refused is None and not o.left for o in record.outcomes),
            num_losses=timeline.num_losses,
            virtual_s=loop.time() - begun_s,
            error_codes=tuple(code for o in record.outcomes if (code := _code(o)) is not None),
            gaps_s=tuple(observer.gaps_s),
            handovers=observer.handovers,
            num_switches=observer.num_switches,
            num_claimed_rows=sum(e.device.core.mover.counters.claimed_rows for e in cluster.processes),
            num_link_faults_hit=0 if cluster.network is None else cluster.network.num_faults_hit,
        )


def _router(schedule: Schedule) -> RouterPolicy | None:
    if schedule.hand_overs is None or not schedule.hand_overs.everyone:
        return None
    return elsewhere(load_policy(schedule.front.router_policy))


async def _switch(
    cluster: SimCluster, switch: SimSwitch, name: str, origin_s: float, log: Callable[..., None]
) -> None:
    """What an operator does; an instance that is not there, or one too many, is refused."""
    await asyncio.sleep(origin_s + switch.at_s - asyncio.get_running_loop().time())
    try:
        standing = cluster.front.set_role(name, switch.role, None, pinned=False)
        log("role", name, switch.role, standing.epoch)
    except XllmError as error:
        log("role", name, switch.role, error.code)


def _mover(
    cluster: SimCluster, schedule: Schedule, index: int, names: list[str], log: Callable[..., None]
) -> Callable[[Outcome], None]:
    """What an operator or a balancer does to one request, whenever its client has read so far."""
    planned = () if schedule.hand_overs is None else schedule.hand_overs.moves
    moves = [m for m in planned if m.request == index]

    def on_delta(outcome: Outcome) -> None:
        for move in moves:
            if move.after == len(outcome.deltas) and outcome.spec is not None:
                request_id, target = outcome.spec.request_id, names[move.instance]
                log("move", request_id, target, cluster.front.move(request_id, target))

    return on_delta


def _code(outcome: Outcome) -> str | None:
    if outcome.refused is not None:
        return f"refused:{outcome.refused.code}"
    return None if outcome.error is None else outcome.error.code


def _may_be_full(schedule: Schedule) -> bool:
    """Whether the instances may have refused requests because there were too many."""
    room = schedule.scheduler.max_num_seqs + schedule.scheduler.max_num_queued_reqs
    return len(schedule.requests) >= room


def _stuck(schedule: Schedule, why: str) -> Report:
    return Report(
        seed=schedule.seed,
        wrong=(why,),
        digest="",
        num_requests=len(schedule.requests),
        num_faults_hit=0,
        num_completed=0,
        num_losses=0,
        virtual_s=0.0,
    )
