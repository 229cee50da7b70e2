"""A toy cluster in a closed loop with the real router and the real control: steps, queues, streams.

No tokens, no pages, no transfer time: tested is that roles follow the load, not what a hand-over costs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from xllm.config import FrontConfig
from xllm.cost import StepCost, rows_beside
from xllm.service.roles.board import Phases, RoleBoard
from xllm.service.roles.control import ControlState, RoleLimits, tick
from xllm.service.roles.monitor import LoadMonitor
from xllm.service.roles.splits import RoleView
from xllm.service.router.base import InstanceView, RequestView, RouterSnapshot
from xllm.service.router.disaggregated import place
from xllm.service.router.registry import load_policy
from xllm.types import SLO, EngineSnapshot

COST = (2.0, 0.1, 0.00002, 0.3, 0.0004)
CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Requests of one kind arriving at random."""

    per_s: float
    prompt_len: int
    output_len: int


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    id: str
    prompt: int
    output: int
    came_ms: float
    decode: str | None
    rows: int = 0
    out: int = 0
    first_ms: float = 0.0
    last_ms: float = 0.0

    def keeps(self, ttft_ms: float, tpot_ms: float) -> bool:
        if not self.out or self.first_ms - self.came_ms > ttft_ms:
            return False
        return self.out < 2 or (self.last_ms - self.first_ms) / (self.out - 1) <= tpot_ms


@dataclass(slots=True)
class Engine:
    name: str
    waiting: list[Request] = field(default_factory=list)
    streams: list[Request] = field(default_factory=list)
    free_ms: float = 0.0

    @property
    def context(self) -> int:
        return sum(r.prompt + r.out for r in self.streams)

    @property
    def backlog(self) -> int:
        return sum(r.prompt - r.rows for r in self.waiting)


class Cluster:
    """`run` through a schedule of shapes; `requests` then tell how it went, `flips` who switched when."""

    def __init__(
        self, roles: dict[str, Phases], *, adaptive: bool = True, seed: int = 1, noise: float = 0.0
    ) -> None:
        self.now_ms = 0.0
        self.requests: list[Request] = []
        self.flips: list[tuple[float, str, str, str]] = []
        self.board = RoleBoard()
        for name, phases in roles.items():
            self.board.joined(name, phases, 0.0)
        self.limits = RoleLimits(ttft_ms=1000.0, tpot_ms=60.0)
        self._config = FrontConfig(slo_ttft_ms=1000.0, slo_tpot_ms=60.0)
        self._policy = load_policy("slo-aware")
        self._engines = {name: Engine(name) for name in roles}
        self._adaptive = adaptive
        self._noise = noise
        self._state, self._monitor = ControlState(), LoadMonitor()
        self._rng = random.Random(seed)
        self._num = 0

    def run(self, shape: Shape, seconds: float) -> None:
        end_ms = self.now_ms + seconds * 1000
        next_ms = self.now_ms + self._gap_ms(shape)
        while self.now_ms < end_ms:
            while next_ms <= self.now_ms:
                self._arrive(shape)
                next_ms += self._gap_ms(shape)
            for engine in self._engines.values():
                if engine.free_ms <= self.now_ms:
                    self._step(engine)
            if round(self.now_ms) % 1000 == 0:
                self._look()
            self.now_ms += 1.0

    def attainment(self, since_ms: float = 0.0) -> float:
        asked = [r for r in self.requests if r.came_ms >= since_ms]
        return sum(r.keeps(self.limits.ttft_ms, self.limits.tpot_ms) for r in asked) / len(asked)

    def roles(self) -> list[str]:
        return sorted(s.role for s in self.board.standings().values())

    def _gap_ms(self, shape: Shape) -> float:
        return self._rng.expovariate(shape.per_s) * 1000

    def _arrive(self, shape: Shape) -> None:
        self._num += 1
        length = max(1, round(shape.prompt_len * self._rng.uniform(0.7, 1.3)))
        output = max(1, round(shape.output_len * self._rng.uniform(0.7, 1.3)))
        view = RequestView(
            request_id=f"r{self._num}",
            model="m",
            num_prompt_tokens=length,
            max_tokens=output,
            slo=SLO(ttft_ms=self.limits.ttft_ms, tpot_ms=self.limits.tpot_ms),
        )
        placement = place(
            self._policy, view, RouterSnapshot(instances=self._views(), turn=self._num), self._config
        )
        assert placement is not None
        request = Request(
            id=view.request_id, prompt=length, output=output, came_ms=self.now_ms, decode=placement.decode
        )
        self.requests.append(request)
        self._engines[placement.instance].waiting.append(request)
        self._monitor.arrived("m", length)

    def _step(self, engine: Engine) -> None:
        """What ends now was begun when the engine was last free: its duration is charged afterwards."""
        chunk = self._chunk(engine)
        rows, attended = chunk, 0
        done: list[Request] = []
        for request in engine.waiting:
            take = min(rows, request.prompt - request.rows)
            attended += take * request.rows + take * (take + 1) // 2
            request.rows += take
            rows -= take
            if request.rows == request.prompt:
                done.append(request)
        if rows == chunk and not engine.streams:
            return
        took_ms = StepCost(COST).step_ms(chunk - rows, attended, len(engine.streams), engine.context)
        end_ms = engine.free_ms = self.now_ms + took_ms * (1 + self._noise * self._rng.uniform(-1, 1))
        for request in engine.streams:
            self._monitor.spoke(engine.name, end_ms - request.last_ms)
            request.out, request.last_ms = request.out + 1, end_ms
        engine.streams = [r for r in engine.streams if r.out < r.output]
        for request in done:
            engine.waiting.remove(request)
            request.out, request.first_ms, request.last_ms = 1, end_ms, end_ms
            if request.output > 1:
                self._engines[request.decode or engine.name].streams.append(request)

    def _chunk(self, engine: Engine) -> int:
        """As the scheduler of an engine bounds it."""
        if not engine.streams:
            return CHUNK
        return min(
            CHUNK, rows_beside(StepCost(COST), len(engine.streams), engine.context, self.limits.tpot_ms)
        )

    def _views(self) -> tuple[InstanceView, ...]:
        return tuple(self._view(engine) for _, engine in sorted(self._engines.items()))

    def _view(self, engine: Engine) -> InstanceView:
        standing = self.board.standing(engine.name)
        coming = [r for e in self._engines.values() for r in e.waiting if r.decode == engine.name]
        return InstanceView(
            name=engine.name,
            num_reqs=len(engine.waiting) + len(engine.streams),
            max_reqs=None,
            engine=EngineSnapshot(
                num_requests=len(engine.waiting) + len(engine.streams),
                num_running=len(engine.streams) + bool(engine.waiting),
                backlog_tokens=engine.backlog,
                num_decoding=len(engine.streams),
                decode_context=engine.context,
                cost=COST,
            ),
            phases=standing.phases,
            old_phases=standing.old_phases,
            coming_reqs=len(coming),
            coming_tokens=sum(r.prompt for r in coming),
        )

    def _look(self) -> None:
        now_s = self.now_ms / 1000
        self._monitor.period(now_s)
        for view in self._views():
            # As the keeper does, but for requests of its new phase that hide the old ones.
            if "prefill" in view.old_phases and not view.engine.backlog_tokens:
                self.board.drained(view.name, "prefill")
            if "decode" in view.old_phases and not view.engine.num_decoding:
                self.board.drained(view.name, "decode")
        if not self._adaptive:
            return
        views = []
        for view in self._views():
            standing = self.board.standing(view.name)
            views.append(
                RoleView(
                    load=view,
                    epoch=standing.epoch,
                    since_s=standing.since_s,
                    is_first_role=standing.reason == "started",
                    tpot_ms=self._monitor.tpot_ms(view.name),
                )
            )
        for switch in tick(views, self._monitor.demand("m"), self._state, self.limits, now_s):
            before = self.board.standing(switch.instance).role
            after = self.board.switch(
                switch.instance, switch.phases, now_s, switch.reason, epoch=switch.epoch
            )
            self.flips.append(
                (now_s, switch.instance, f"{before}>{after.role}:{switch.reason}", switch.numbers)
            )
