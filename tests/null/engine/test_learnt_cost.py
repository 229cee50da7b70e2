"""An engine learns how long its steps take from its own, in the units that routers predict with."""

from __future__ import annotations

import random

import msgspec
import pytest

from xllm.config import SchedulerConfig
from xllm.cost import StepCost
from xllm.engine.core import EngineCore
from xllm.engine.executor.inproc import InProcExecutor
from xllm.engine.plan import StepPlan, StepResult
from xllm.testing.null_engine import null_engine, spec

TRUE = StepCost((2.0, 0.1, 0.0005, 0.3, 0.0002))


class TimedExecutor:
    """Computes on the null device and says that it took what the work costs, row by row."""

    depth = 1

    def __init__(self, inner: InProcExecutor) -> None:
        self._inner = inner
        self._ms = 0.0

    def submit(self, plan: StepPlan) -> None:
        c0, c1, c2, c3, c4 = TRUE.coefficients
        self._ms = c0
        for entry in plan.sequences:
            if len(entry.tokens) == 1 and entry.sample is not None:
                self._ms += c3 + c4 * (entry.start + 1)
            else:
                self._ms += sum(c1 + c2 * (entry.start + row + 1) for row in range(len(entry.tokens)))
        self._inner.submit(plan)

    def collect(self) -> StepResult:
        return msgspec.structs.replace(self._inner.collect(), elapsed_ms=self._ms)

    def execute(self, plan: StepPlan) -> StepResult:
        return self._inner.execute(plan)

    def close(self) -> None:
        self._inner.close()


def run_some(core: EngineCore, seed: int = 1) -> None:
    """Prompts of all lengths, in chunks and in company."""
    rng = random.Random(seed)
    for number in range(30):
        prompt = tuple(rng.randrange(2, 50) for _ in range(rng.randint(2, 600)))
        core.submit(spec(f"r{number}", prompt, max_tokens=rng.randint(1, 20), ignore_eos=True))
        if number % 5 == 4:
            while core.has_requests:
                for frame in core.step()[1]:
                    core.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))


def test_what_the_snapshot_says_predicts_the_next_prompt() -> None:
    made = null_engine(num_pages=200, config=SchedulerConfig(max_num_batched_tokens=128))
    executor = TimedExecutor(InProcExecutor(made.runner))
    core = EngineCore(made.core.card, made.core.scheduler, made.memory, executor, made.clock)
    assert core.snapshot().cost == ()
    run_some(core)
    cost = StepCost.known(core.snapshot().cost)
    assert cost is not None
    assert core.snapshot().cost_error < 0.02
    assert cost.prefill_ms(600, 0, max_rows=128) == pytest.approx(
        TRUE.prefill_ms(600, 0, max_rows=128), rel=0.02
    )
    assert cost.prefill_ms(600, 512) == pytest.approx(TRUE.prefill_ms(600, 512), rel=0.05)
    assert cost.decode_ms(5, 2000) == pytest.approx(TRUE.decode_ms(5, 2000), rel=0.05)
