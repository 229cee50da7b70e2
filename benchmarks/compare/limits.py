"""What a reader is promised, and when a run can no longer keep it. Pure functions of counts and times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xllm.cli.bench.metrics import Outcome

MAX_TTFT_S = 2.0
"""Of the p99, too: answers that never begin would otherwise look smooth."""

MIN_CONFIRMING = 300
"""A p99 of fewer requests is little more than their maximum."""


def hopeless_count(num_requests: int) -> int:
    """With as many requests over a limit, the p99 (linear interpolation) is over it for certain."""
    return num_requests - math.floor(0.99 * (num_requests - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """p99 of TPOT = (E2E − TTFT) ÷ (n − 1) and of TTFT over one run of `num_requests`."""

    tpot_s: float
    num_requests: int
    ttft_s: float = MAX_TTFT_S

    def broken(self, outcomes: Sequence[Outcome], ages_s: Sequence[float], output_len: int) -> bool:
        """Whether no continuation of the run can keep it. `ages_s`: of requests still under way."""
        many = hopeless_count(self.num_requests)
        slow = sum(outcome.tpot_s > self.tpot_s for outcome in outcomes)
        late = sum(outcome.ttft_s > self.ttft_s for outcome in outcomes)
        # So old that one of the two is over, whichever: counted once, for either.
        old = sum(age > self.ttft_s + (output_len - 1) * self.tpot_s for age in ages_s)
        failed = any(outcome.error for outcome in outcomes)
        return failed or slow >= many or late >= many or slow + late + old >= 2 * many - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One run at rate index `index`. `gave_up_s`: the TPOT limit at which it was ended early."""

    index: int
    num_requests: int
    failed: int
    tpot_s: tuple[float, ...]
    ttft_s: tuple[float, ...]
    gave_up_s: float | None = None

    @classmethod
    def of(cls, index: int, promise: Promise, outcomes: Sequence[Outcome]) -> Reading:
        done = [outcome for outcome in outcomes if outcome.ok]
        return cls(
            index=index,
            num_requests=promise.num_requests,
            failed=len(outcomes) - len(done),
            tpot_s=tuple(outcome.tpot_s for outcome in done),
            ttft_s=tuple(outcome.ttft_s for outcome in done),
            gave_up_s=promise.tpot_s if len(outcomes) < promise.num_requests else None,
        )

    @property
    def confirms(self) -> bool:
        return self.num_requests >= MIN_CONFIRMING and self.gave_up_s is None

    def p99_ms(self) -> tuple[float, float]:
        """(TPOT, TTFT), of the requests that ended."""
        tpot, ttft = (
            float(np.percentile(v, 99)) * 1e3 if v else math.nan for v in (self.tpot_s, self.ttft_s)
        )
        return tpot, ttft

    def keeps(self, tpot_s: float) -> bool | None:
        """None = a run that was ended early for a stricter limit says nothing about this one.

        A short run keeps a limit while fewer requests than make it hopeless are over it.
        """
        if self.failed:
            return False
        if self.gave_up_s is not None:
            return False if tpot_s <= self.gave_up_s else None
        if self.num_requests >= MIN_CONFIRMING:
            tpot_ms, ttft_ms = self.p99_ms()
            return tpot_ms <= tpot_s * 1e3 and ttft_ms <= MAX_TTFT_S * 1e3
        many = hopeless_count(self.num_requests)
        slow = sum(value > tpot_s for value in self.tpot_s)
        late = sum(value > MAX_TTFT_S for value in self.ttft_s)
        return slow < many and late < many
