"""Numbers of a run under faults, as lines for people and a value for the results folder."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.faults.run import Outcome

WINDOW_S = 0.25
AROUND_S = 4.0
"""How long after a fault its dip is looked for."""


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(outcome: Outcome) -> dict[str, Any]:
    # With more faults than streams nearly every stream saw one.
    hit = outcome.gaps_s
    rates = window_rates(outcome)
    typical = statistics.median(rates) if rates else 0.0
    dips = [dip_s(rates, at_s - outcome.began_s, typical) for at_s in outcome.faults_s]
    return {
        "answers": outcome.num_answers,
        "broken": len(outcome.broken),
        "different": len(outcome.different),
        "faults": len(outcome.faults_s),
        "seconds": round(outcome.ended_s - outcome.began_s, 1),
        "pieces_per_s_median": round(typical, 1),
        "noticed_ms_p50": round(percentile(outcome.noticed_s, 0.5) * 1000),
        "noticed_ms_p99": round(percentile(outcome.noticed_s, 0.99) * 1000),
        "longest_gap_ms_p50": round(percentile(hit, 0.5) * 1000),
        "longest_gap_ms_p99": round(percentile(hit, 0.99) * 1000),
        "longest_gap_ms_max": round(max(hit, default=0.0) * 1000),
        "below_half_goodput_ms_p50": round(percentile(dips, 0.5) * 1000),
        "below_half_goodput_ms_p99": round(percentile(dips, 0.99) * 1000),
    }


def window_rates(outcome: Outcome) -> list[float]:
    """Pieces of output a second, in windows of WINDOW_S over the whole run."""
    num = int((outcome.ended_s - outcome.began_s) / WINDOW_S)
    counts = [0] * num
    for at_s in outcome.token_times_s:
        index = int((at_s - outcome.began_s) / WINDOW_S)
        if 0 <= index < num:
            counts[index] += 1
    return [count / WINDOW_S for count in counts]


def dip_s(rates: list[float], fault_s: float, typical: float) -> float:
    """For how long after a fault, so long after the start, the output stood below half of what is typical."""
    first = int(fault_s / WINDOW_S)
    after = rates[first : first + int(AROUND_S / WINDOW_S)]
    return WINDOW_S * sum(1 for rate in after if rate < typical / 2)
