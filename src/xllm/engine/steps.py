"""The steps that an engine core has under way: handed over, collected in order, and timed.

What a step computes is the scheduler's, when the next is planned the loop's business. Owned by the step
thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from xllm.clock import Clock
from xllm.engine.executor.base import Executor
from xllm.engine.plan import StepPlan, StepResult
from xllm.engine.progress import Pace, Shape, shape_of


@dataclass(frozen=True, slots=True)
class Underway:
    plan: StepPlan
    shape: Shape
    predicted_ms: float
    """0 = not known yet."""


class Steps:
    """`num_gaps` pairs of steps followed each other while there was work, and the device idled for `gaps_ms`
    between them in all: what planning, telling and waiting cost it. Only where somebody stamps the steps."""

    def __init__(self, executor: Executor, clock: Clock) -> None:
        self._executor = executor
        self._clock = clock
        self._underway: deque[Underway] = deque()
        self._ended_s = 0.0
        self.began_s = 0.0
        """When the oldest step under way began: it was handed over, or the one before it ended."""
        self.pace = Pace()
        self.last_ms = 0.0
        self.num_gaps = 0
        self.gaps_ms = 0.0

    def __len__(self) -> int:
        return len(self._underway)

    @property
    def overlap(self) -> bool:
        """Does the device run a step while the caller plans the next?"""
        return self._executor.depth > 1

    @property
    def has_room(self) -> bool:
        """May another one be handed over?"""
        return len(self._underway) < self._executor.depth

    @property
    def predicted_ms(self) -> float:
        """Of the oldest one; 0 = none, or not known."""
        return self._underway[0].predicted_ms if self._underway else 0.0

    def submit(self, plan: StepPlan) -> None:
        shape = shape_of(plan)
        if not self._underway:
            self.began_s = self._clock.monotonic_s()
        self._underway.append(Underway(plan, shape, self.pace.predict_ms(shape)))
        self._executor.submit(plan)

    def collect(self) -> tuple[StepPlan, StepResult]:
        """The oldest one and its result; waits for it."""
        result = self._executor.collect()
        step = self._underway.popleft()
        self.began_s = result.ended_s or self._clock.monotonic_s()
        if not result.dropped:
            self._time(step, result)
        return step.plan, result

    def rest(self) -> None:
        """Nothing can run: what follows now is no gap."""
        self._ended_s = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        """On its own, with nothing under way."""
        return self._executor.execute(plan)

    def close(self) -> None:
        self._executor.close()

    def _time(self, step: Underway, result: StepResult) -> None:
        elapsed_ms = result.elapsed_ms
        if result.ended_s:
            elapsed_ms = (result.ended_s - result.began_s) * 1000
            if self._ended_s:
                self.num_gaps += 1
                self.gaps_ms += max(0.0, result.began_s - self._ended_s) * 1000
            self._ended_s = result.ended_s
        self.last_ms = elapsed_ms
        self.pace.observe(step.shape, elapsed_ms)
