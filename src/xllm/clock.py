"""Time as a collaborator. Policy code never imports `time`; it is handed a `Clock`.

Only the composers (`cli`, engine process, front) create a `SystemClock`; tests and the
simulator pass `xllm.testing.FakeClock`.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds from an arbitrary origin; never goes back."""

    def wall_s(self) -> float:
        """Unix time in seconds, for `created` stamps only; never for durations."""


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
