"""How many prompt rows fit beside sequences that draw, so that the step keeps their time per token.

One rule for all who need it: the scheduler plans by it, routers and the control of roles predict by it.
Arithmetic only; who draws and what was promised to them is the caller's knowledge.
"""

from __future__ import annotations

import math

from xllm.cost.step import StepCost

MIN_ROWS = 16
"""Prompts always get on by so much, and rows come in multiples of it: kernels compute so many together."""
AIM = 0.9
"""Share of the objective that a step is planned to take: a fit errs, and the way to a client counts."""
MIN_SHARE = 0.25
"""Of the draws' own time, what prompts get at least. Where the draws alone take up the objective it is lost
already, or nearly so; starving the prompts as well would keep nobody's."""


def rows_beside(
    cost: StepCost, num_decoding: float, decode_context: float, tpot_ms: float, *, start: int = 0
) -> int:
    """Rows of a prompt that stands at `start`; at least `MIN_ROWS`, and a multiple of it."""
    _, c1, c2, _, _ = cost.coefficients
    draws_ms = cost.decode_ms(num_decoding, decode_context)
    left_ms = max(AIM * tpot_ms - draws_ms, MIN_SHARE * draws_ms)
    # c1·r + c2·(start·r + r²/2) ≤ left_ms, the positive root.
    linear = c1 + c2 * start
    root = math.sqrt(linear * linear + 2.0 * c2 * left_ms)
    if linear + root <= 0.0:
        return UNBOUNDED
    rows = min(UNBOUNDED, int(2.0 * left_ms / (linear + root)))
    return max(MIN_ROWS, rows - rows % MIN_ROWS)


UNBOUNDED = 1 << 20
"""Rows that were seen to cost nothing."""
