"""A model of engines under Poisson load, in virtual time: slots, steps that start a few, random lengths.

Arrivals ask the real `Admission`; everything else is a few lines of queueing theory in action.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

from xllm.config import FrontConfig
from xllm.errors import CapacityError
from xllm.service.admission import Admission, Ask
from xllm.service.router.base import InstanceView
from xllm.types import EngineSnapshot

STEP_S = 0.05
STARTS_PER_STEP = 8


@dataclass(slots=True)
class Server:
    """One engine: at most `slots` run; a step starts a few of those that wait and ends those that are due."""

    name: str
    slots: int
    waiting: deque[str] = field(default_factory=deque)
    running: list[tuple[float, str]] = field(default_factory=list)
    step: int = 0
    snapshot: EngineSnapshot = field(default_factory=EngineSnapshot)

    def view(self) -> InstanceView:
        num = len(self.waiting) + len(self.running)
        return InstanceView(name=self.name, num_reqs=num, max_reqs=1000, engine=self.snapshot)


@dataclass(slots=True)
class Outcome:
    arrived_s: float
    tenant: str
    wait_s: float | None = None
    ended_s: float | None = None


class Queueing:
    """`service_s` is the mean time a request holds its slot; `spread` how much that varies (0 to 1)."""

    def __init__(
        self, config: FrontConfig, *, servers: int = 1, slots: int = 16, service_s: float = 2.0, seed: int = 1
    ) -> None:
        self.admission = Admission(config)
        self.servers = [Server(f"i{n}", slots) for n in range(servers)]
        self.capacity_per_s = servers * slots / (service_s + STEP_S / 2)
        self.outcomes: dict[str, Outcome] = {}
        self.refusals: list[tuple[float, str, CapacityError]] = []
        self.max_waiting = 0
        self.now_s = 0.0
        self._service_s = service_s
        self._random = random.Random(seed)
        self._num = 0

    def run(self, seconds: float, rates_per_s: dict[str, float], *, spread: float = 0.5) -> None:
        """Poisson arrivals of each tenant at its rate, for that long."""
        end_s = self.now_s + seconds
        arrivals = [(self.now_s + self._random.expovariate(r), t, r) for t, r in rates_per_s.items() if r]
        heapq.heapify(arrivals)
        while self.now_s < end_s:
            self.now_s += STEP_S
            while arrivals and arrivals[0][0] <= self.now_s:
                at_s, tenant, rate = heapq.heappop(arrivals)
                self._arrive(at_s, tenant)
                heapq.heappush(arrivals, (at_s + self._random.expovariate(rate), tenant, rate))
            for server in self.servers:
                self._step(server, spread)

    def _arrive(self, at_s: float, tenant: str) -> None:
        self._num += 1
        ask = Ask(
            request_id=f"{self._num:032x}", model="m", num_prompt_tokens=64, max_tokens=64, tenant=tenant
        )
        try:
            self.admission.admit(ask, [s.view() for s in self.servers], at_s)
        except CapacityError as error:
            self.refusals.append((at_s, tenant, error))
            return
        server = min(self.servers, key=lambda s: len(s.waiting) + len(s.running))
        server.waiting.append(ask.request_id)
        self.admission.placed(ask.request_id, server.name)
        self.outcomes[ask.request_id] = Outcome(at_s, tenant)
        self.max_waiting = max(self.max_waiting, len(server.waiting))

    def _step(self, server: Server, spread: float) -> None:
        server.step += 1
        while server.running and server.running[0][0] <= self.now_s:
            _, request_id = heapq.heappop(server.running)
            self.outcomes[request_id].ended_s = self.now_s
            self.admission.ended(request_id, (64,), complete=True)
        started = []
        while server.waiting and len(server.running) < server.slots and len(started) < STARTS_PER_STEP:
            started.append(server.waiting.popleft())
            holds_s = self._service_s * self._random.uniform(1 - spread, 1 + spread)
            heapq.heappush(server.running, (self.now_s + holds_s, started[-1]))
        num_waiting, num_running = len(server.waiting), len(server.running)
        server.snapshot = EngineSnapshot(
            step=server.step,
            num_waiting=num_waiting,
            num_running=num_running,
            num_requests=num_waiting + num_running,
            total_pages=1 << 20,
        )
        for request_id in started:
            outcome = self.outcomes[request_id]
            outcome.wait_s = self.now_s - outcome.arrived_s
            self.admission.answered(request_id, server.snapshot, self.now_s)

    def waits_s(self, since_s: float, until_s: float) -> list[float]:
        """Waits of the requests that arrived in that time, sorted."""
        return sorted(
            o.wait_s
            for o in self.outcomes.values()
            if since_s <= o.arrived_s < until_s and o.wait_s is not None
        )

    def num_ended(self, since_s: float, until_s: float, tenant: str | None = None) -> int:
        return sum(
            o.ended_s is not None and since_s <= o.ended_s < until_s and tenant in (None, o.tenant)
            for o in self.outcomes.values()
        )
