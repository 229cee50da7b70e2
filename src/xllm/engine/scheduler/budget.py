"""How many prompt rows a step may have: the step-time budget of one plan.

Pure: a few numbers about the sequences that draw, and what steps are known to take. Which prompt gets the
rows is the scheduler's order.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.cost import StepCost, rows_beside

UNKNOWN_ROWS = 128
"""Beside streams with an objective, until this engine has learnt what rows cost: one long step would miss it,
and small ones teach as much."""


def step_budget(
    cost: StepCost | None, drawing: Iterable[tuple[int, float | None]], *, max_rows: int, start: int
) -> int:
    """Rows of prompts beside `drawing`, which are (tokens stood on, objective per token in ms or None).

    `start` is the position at which the first of those rows stands. The strictest objective counts; without
    one, or with nobody drawing, there is nothing to keep and prompts get all `max_rows`.
    """
    num = context = 0
    strictest_ms = float("inf")
    for num_tokens, tpot_ms in drawing:
        num += 1
        context += num_tokens
        if tpot_ms is not None and tpot_ms < strictest_ms:
            strictest_ms = tpot_ms
    if strictest_ms == float("inf"):
        return max_rows
    if cost is None:
        return min(max_rows, UNKNOWN_ROWS)
    return min(max_rows, rows_beside(cost, num, context, strictest_ms, start=start))
