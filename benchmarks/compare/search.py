"""The highest Poisson rate that keeps a limit: short probes find it, one long run confirms it or steps down.

Rates lie on a grid of 8 %. Every run counts for every limit it says something about. Pure but for `run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.compare.limits import MIN_CONFIRMING, Promise, Reading

GRID = 1.08
MAX_WIDTH = 8
MIN_RUN_S = 15.0
"""Several lifetimes of a request at the limits that are asked about."""

MIN_INDEX = -30
"""A tenth of a request a second; below, the answer is none."""

Run = Callable[[int, Promise], Reading | None]
"""Measure the rate of an index; None = no time left for it."""


def rate_of(index: int) -> float:
    return float(f"{GRID**index:.3g}")


def index_of(rate: float) -> int:
    """The nearest one."""
    index = MIN_INDEX
    while rate_of(index + 1) <= rate:
        index += 1
    return index if rate / rate_of(index) < rate_of(index + 1) / rate else index + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`rate` 0: none is kept. `reading` None: no run kept it. `ended`: whether the search came to its end."""

    tpot_s: float
    rate: float
    reading: Reading | None
    ended: bool


@dataclass(slots=True)
class Search:
    """The ladder of one engine and shape; all its limits share the readings."""

    run: Run
    start: int
    num_probe: int = 64
    num_confirm: int = MIN_CONFIRMING
    readings: list[Reading] = field(default_factory=list)

    def find(self, tpot_s: float) -> Found:
        width = 2
        refused: int | None = None
        while True:
            low, high = self._bounds(tpot_s)
            if high is not None and high.index <= MIN_INDEX:
                return Found(tpot_s=tpot_s, rate=0.0, reading=None, ended=True)
            if low and low.confirms and high and high.index == low.index + 1:
                return Found(tpot_s=tpot_s, rate=rate_of(low.index), reading=low, ended=True)
            index, is_long = self._next(low, high, width, refused)
            if low is None or high is None:
                width = min(2 * width, MAX_WIDTH)
            promise = Promise(tpot_s=tpot_s, num_requests=self._num_requests(index, is_long))
            reading = self.run(index, promise)
            if reading is None:
                rate = rate_of(low.index) if low else 0.0
                return Found(tpot_s=tpot_s, rate=rate, reading=low, ended=False)
            self.readings.append(reading)
            if is_long and not reading.keeps(tpot_s):
                refused = index

    def _num_requests(self, index: int, is_long: bool) -> int:
        """A short run at a high rate would end before the queue it causes."""
        shortest = math.ceil(rate_of(index) * MIN_RUN_S)
        return max(self.num_confirm if is_long else self.num_probe, shortest)

    def _next(
        self, low: Reading | None, high: Reading | None, width: int, refused: int | None
    ) -> tuple[int, bool]:
        """(index to measure, whether by a long run). `refused`: by the last long run, for this limit."""
        if high is not None and low is not None:
            if high.index == low.index + 1:
                return low.index, True
            return (low.index + high.index) // 2, False
        if high is not None:
            # A probe kept it and the long run did not: it is nearly right.
            is_near = high.index == refused
            return max(MIN_INDEX, high.index - (1 if is_near else width)), is_near
        if low is not None:
            return low.index + width, False
        known = [reading.index for reading in self.readings if reading.gave_up_s is None]
        return max(known, default=self.start), False

    def _bounds(self, tpot_s: float) -> tuple[Reading | None, Reading | None]:
        """(the highest that keeps it below the lowest that does not, the latter). Longer runs overrule."""
        best: dict[int, Reading] = {}
        for reading in sorted(self.readings, key=lambda r: r.num_requests):
            if reading.keeps(tpot_s) is not None:
                best[reading.index] = reading
        confirmed = max((r.index for r in best.values() if r.confirms and r.keeps(tpot_s)), default=None)
        # A short run that failed below a rate that a long one has confirmed was bad luck.
        broken = [
            r for r in best.values() if not r.keeps(tpot_s) and (confirmed is None or r.index > confirmed)
        ]
        high = min(broken, key=lambda r: r.index, default=None)
        kept = [r for r in best.values() if r.keeps(tpot_s) and (high is None or r.index < high.index)]
        return max(kept, key=lambda r: r.index, default=None), high
