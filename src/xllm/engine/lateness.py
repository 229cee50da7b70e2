"""When to plan the step behind the one that runs: as late as it still is ready in time.

A request that arrives after the next step was planned waits for the one after that. Planned at the very end
of the running step, the next one takes in all that arrived meanwhile. Pure.
"""

from __future__ import annotations

MARGIN_S = 0.0015
"""Planning and handing over take about a third of it; the rest is for a thread that wakes late."""
MARGIN_RATIO = 0.15
"""Predictions are off by a few percent, and a step that ends early must not wait for its successor."""


def plan_at_s(began_s: float, predicted_ms: float) -> float:
    """When the step behind one that began then should be planned; in the past = at once.

    `predicted_ms` 0 = nobody knows how long it takes: at once.
    """
    predicted_s = predicted_ms / 1000
    return began_s + predicted_s - max(MARGIN_S, MARGIN_RATIO * predicted_s)
