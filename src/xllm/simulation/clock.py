"""The clock of a simulation: a virtual loop's time, and a wall clock that may be set wrongly.

Policy code gets it as its `Clock`; nobody here reads the machine's time.
"""

from __future__ import annotations

import asyncio

WALL_ORIGIN_S = 1_800_000_000.0


class VirtualClock:
    """`jump_wall` is somebody setting the machine's date; durations must not notice."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._wall_offset_s = WALL_ORIGIN_S

    def monotonic_s(self) -> float:
        return self._loop.time()

    def wall_s(self) -> float:
        return self._wall_offset_s + self._loop.time()

    def jump_wall(self, seconds: float) -> None:
        self._wall_offset_s += seconds
