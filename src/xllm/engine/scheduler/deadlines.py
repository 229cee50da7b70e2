"""Which requests are out of time. Pure; ended requests are forgotten lazily and never pile up."""

from __future__ import annotations

import heapq

from xllm.engine.request import Request
from xllm.errors import DeadlineError

SLACK = 64
"""Entries of ended requests that may stay before the heap is made anew."""

DEADLINE_PASSED = DeadlineError("the request's deadline passed").info()


class Deadlines:
    """The engine's own clock decides: a front that is late, or gone silent, cannot hold its pages longer."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request, num_alive: int) -> None:
        """`num_alive` requests have not ended, this one included."""
        deadline_ms = request.spec.deadline_ms
        if deadline_ms is None:
            return
        if len(self._heap) > 2 * num_alive + SLACK:
            self._heap = [entry for entry in self._heap if not entry[2].ended]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (request.arrived_s + deadline_ms / 1000, request.arrival, request))

    def passed(self, now_s: float) -> list[Request]:
        """Those that should end now; each is told once."""
        due: list[Request] = []
        while self._heap and self._heap[0][0] <= now_s:
            request = heapq.heappop(self._heap)[2]
            if not request.ended:
                due.append(request)
        return due
