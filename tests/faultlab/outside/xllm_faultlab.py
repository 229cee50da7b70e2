"""A logits processor that breaks the engine for marked requests: the tests' failpoints, by entry point.

The mark is the request's seed: KIND * 1_000_000 + output offset at which it happens. Every draw may also
be slowed down (FAULTLAB_PACE_MS), so that a fault meets a stream in the middle.
"""

from __future__ import annotations

import os
import select
import time

import numpy as np

ABORT, HANG, RAISE = 661, 662, 663
MILLION = 1_000_000
PACE_S = float(os.environ.get("FAULTLAB_PACE_MS", "0")) / 1000


class Faultlab:
    name = "faultlab"

    def __call__(self, logits: np.ndarray, op) -> None:
        if PACE_S:
            # Not time.sleep: libfaketime breaks that one when it fakes no monotonic clock.
            select.select([], [], [], PACE_S)
        kind, offset = divmod(op.seed, MILLION)
        if op.offset != offset:
            return
        if kind == ABORT:
            os.abort()
        if kind == HANG:
            # Alive, yet without progress: the I/O thread goes on, the step never ends.
            time.sleep(3600)
        if kind == RAISE:
            raise ValueError("a failpoint was hit")
