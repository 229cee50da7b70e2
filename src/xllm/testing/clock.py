"""A clock that only moves when a test says so."""

from __future__ import annotations


class FakeClock:
    """Starts at `start_s`; `wall_s` runs in step with `monotonic_s` from a fixed date."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def monotonic_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return 1_700_000_000.0 + self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError("a clock never goes back")
        self._now_s += seconds
