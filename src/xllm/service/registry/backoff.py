"""How long to wait before the next try: doubling, bounded, with jitter, so that a crowd does not march."""

from __future__ import annotations

import random


class Backoff:
    """`delay_s` grows from `first_s` to `limit_s`; `reset` after a success."""

    def __init__(self, first_s: float = 0.1, limit_s: float = 5.0, rng: random.Random | None = None) -> None:
        self._first_s = first_s
        self._limit_s = limit_s
        self._rng = rng if rng is not None else random.Random()
        self._num_tries = 0

    def delay_s(self) -> float:
        """Between half and all of the current step; the next call's step is twice as long."""
        # The exponent is bounded too: 2.0 ** 1024 overflows after a long outage.
        step_s = min(self._limit_s, self._first_s * 2.0 ** min(self._num_tries, 40))
        self._num_tries += 1
        return step_s * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._num_tries = 0
