"""When requests are sent: seconds from the start of the run, fixed before it begins (open loop).

A closed loop would send the next request when an answer comes, so that a slow server lowers the very
load that it is measured under. Pure functions of their arguments and the generator passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xllm.errors import ConfigError


def arrival_times(num_requests: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Sorted send times in seconds, the first one 0.

    `rate` is requests per second, inf = all at once. Gaps are Gamma distributed with mean 1/rate and
    coefficient of variation burstiness^-1/2: 1 is a Poisson process, below 1 bursty, above 1 regular.
    """
    if rate <= 0 or math.isnan(rate):
        raise ConfigError(f"request rate is {rate}; it must be above 0, or inf for all at once")
    if burstiness <= 0 or not math.isfinite(burstiness):
        raise ConfigError(f"burstiness is {burstiness}; it must be above 0 (1 = Poisson)")
    if num_requests == 0 or math.isinf(rate):
        return [0.0] * num_requests
    gaps = rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=num_requests - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def from_timestamps(timestamps: Sequence[float], speedup: float) -> list[float]:
    """Send times of a recorded trace: relative to its first entry, `speedup` times as fast."""
    if speedup <= 0 or not math.isfinite(speedup):
        raise ConfigError(f"trace speed-up is {speedup}; it must be above 0 (1 = as recorded)")
    if not timestamps:
        return []
    origin = min(timestamps)
    return [(stamp - origin) / speedup for stamp in timestamps]
