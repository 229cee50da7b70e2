"""Prompt rows beside streams: the step keeps the strictest objective, prompts always get on, tokens stay."""

from __future__ import annotations

import pytest

from xllm.cost import StepCost
from xllm.cost.beside import MIN_ROWS, MIN_SHARE
from xllm.engine.scheduler.budget import UNKNOWN_ROWS, step_budget

COST = StepCost((8.0, 0.25, 0.0, 0.5, 0.0005))
QUADRATIC = StepCost((8.0, 0.05, 0.0005, 0.5, 0.0005))


@pytest.mark.parametrize(
    ("cost", "drawing", "rows"),
    [
        (COST, [], 512),
        (COST, [(100, None)] * 9, 512),
        (None, [(100, 30.0)], UNKNOWN_ROWS),
        (None, [(100, None)], 512),
        (COST, [(100, 30.0)], 64),
        (COST, [(100, None), (100, 30.0), (100, 90.0)], 64),
        (COST, [(100, 1000.0)], 512),
        (COST, [(100, 20.0)] * 40, 16),
        (COST, [(100, 5.0)] * 400, 224),
        (StepCost((8.0, 0.0, 0.0, 0.5, 0.0)), [(100, 30.0)], 512),
    ],
)
def test_rows_by_who_draws(cost: StepCost | None, drawing: list[tuple[int, float | None]], rows: int) -> None:
    assert step_budget(cost, drawing, max_rows=512, start=0) == rows


@pytest.mark.parametrize("num", [1, 8, 30, 200])
@pytest.mark.parametrize("start", [0, 1000, 8000])
@pytest.mark.parametrize("cost", [COST, QUADRATIC])
def test_the_step_keeps_the_objective_or_a_bounded_share(cost: StepCost, start: int, num: int) -> None:
    rows = step_budget(cost, [(200, 40.0)] * num, max_rows=512, start=start)
    attended = rows * start + rows * (rows + 1) // 2
    step_ms = cost.step_ms(rows, attended, num, num * 200)
    draws_ms = cost.decode_ms(num, num * 200)
    assert rows >= MIN_ROWS
    assert rows % MIN_ROWS == 0
    assert rows == MIN_ROWS or step_ms <= max(40.0, (1 + MIN_SHARE) * draws_ms) + 0.1
