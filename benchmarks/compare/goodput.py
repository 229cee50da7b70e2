"""The highest of the measured Poisson rates at which an engine keeps its word to readers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.compare.load import Load
from benchmarks.compare.rounds import Result

TPOT_LIMITS_MS = (30, 50, 100)
MAX_TTFT_MS = 2000
"""Of the p99, too: answers that never begin would otherwise look smooth."""


def highest_rate(result: Result, loads: Sequence[Load], tpot_ms: float) -> float | None:
    """Requests/s, None when no measured rate is kept. A failed request breaks a rate."""
    kept = [load.rate for load in loads if load.rate is not None and _keeps(result, load, tpot_ms)]
    return max(kept, default=None)


def _keeps(result: Result, load: Load, tpot_ms: float) -> bool:
    turns = result.turns.get(load.name, [])
    return (
        bool(turns)
        and not any(turn["failed"] for turn in turns)
        and median(turn["p99_tpot_ms"] for turn in turns) <= tpot_ms
        and median(turn["p99_ttft_ms"] for turn in turns) <= MAX_TTFT_MS
    )


def section(results: Sequence[Result], loads: Sequence[Load]) -> list[str]:
    """Markdown; nothing when no rates were measured. Shapes have a list each."""
    lines: list[str] = []
    for lens in sorted({(load.input_len, load.output_len) for load in loads if load.rate is not None}):
        of_shape = [load for load in loads if (load.input_len, load.output_len) == lens]
        lines += [f"## Highest measured rate with p99 TPOT within limits, {lens[0]} in / {lens[1]} out", ""]
        for result in results:
            rates = [highest_rate(result, of_shape, limit) for limit in TPOT_LIMITS_MS]
            told = ", ".join(
                f"{limit} ms: {'none' if rate is None else f'{rate:g} requests/s'}"
                for limit, rate in zip(TPOT_LIMITS_MS, rates, strict=True)
            )
            lines.append(f"* {result.entry.name}: {told if result.turns else 'missing'}")
        lines.append("")
    return lines
