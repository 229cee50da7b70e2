"""How long a new request would wait for its first token at one instance: Little's law, nothing to tune.

The rate of first tokens is measured while somebody queues there, since only then it is the instance's
capacity and not the clients' demand. Pure: time is an argument; the engine's word comes with each event.
"""

from __future__ import annotations

from collections import deque

from xllm.cost import StepCost
from xllm.service.router.base import InstanceView
from xllm.types import EngineSnapshot

MIN_SERVED = 16
"""A rate over that many first tokens is within a quarter of the truth or so; more would be slow to learn."""


class ServiceRate:
    """First tokens a second over the last stretch of queueing.

    Time runs only while the engine says that somebody waits. The window holds at least MIN_SERVED first
    tokens and `horizon_s`, whichever is longer, and reaches to the present: a stall lowers the rate at once.
    """

    def __init__(self, horizon_s: float) -> None:
        self._horizon_s = horizon_s
        self._served: deque[tuple[float, int]] = deque()
        self._num_served = 0
        self._begin_s = 0.0
        self._queued_s = 0.0
        self._last_s = 0.0
        self._step = -1
        self._queueing = False
        self._queued_before_step = False

    def note(self, engine: EngineSnapshot, num_first: int, now_s: float) -> None:
        """`num_first` first tokens of the engine's last step came just now; it tells its queue after them."""
        self._queued_s = self._queued_until(now_s)
        self._last_s = now_s
        if engine.step != self._step:
            # The tokens of one step come one by one; the queue that they were taken from is that before it.
            self._step, self._queued_before_step = engine.step, self._queueing
        self._queueing = engine.num_waiting > 0
        if not self._queued_before_step or not num_first:
            return
        self._served.append((self._queued_s, num_first))
        self._num_served += num_first
        while len(self._served) > 1:
            first_s, num_oldest = self._served[0]
            if self._num_served - num_oldest < MIN_SERVED or self._queued_s - first_s < self._horizon_s:
                break
            self._served.popleft()
            self._num_served -= num_oldest
            self._begin_s = first_s

    def per_s(self, now_s: float) -> float | None:
        """None = not seen long enough to say."""
        window_s = self._queued_until(now_s) - self._begin_s
        if window_s <= 0 or (self._num_served < MIN_SERVED and window_s < self._horizon_s):
            return None
        # One is under way in any case; a rate of zero would mean a wait without end.
        return max(1, self._num_served) / window_s

    def _queued_until(self, now_s: float) -> float:
        return self._queued_s + (max(0.0, now_s - self._last_s) if self._queueing else 0.0)


class InstanceQueue:
    """What this front knows of the queue at one instance.

    `num_unanswered` are its own requests there without a first token. `slots` is how many ran when somebody
    had to queue; None until that happened.
    """

    def __init__(self, horizon_s: float) -> None:
        self.num_unanswered = 0
        self._rate = ServiceRate(horizon_s)
        self._slots: int | None = None

    def note(self, engine: EngineSnapshot, num_first: int, now_s: float) -> None:
        self._rate.note(engine, num_first, now_s)
        if engine.num_waiting > 0:
            self._slots = max(self._slots or 0, engine.num_running)

    def wait_s(self, view: InstanceView, now_s: float) -> float:
        """Predicted; 0 where somebody more can start at once, and where nothing is known yet."""
        engine = view.engine
        num_reqs = max(view.num_reqs, engine.num_requests)
        if engine.num_waiting == 0 and (self._slots is None or num_reqs < self._slots):
            return _prefill_s(view)
        rate = self._rate.per_s(now_s)
        if rate is None:
            return _prefill_s(view)
        return max(self.num_unanswered, engine.num_waiting) / rate


def _prefill_s(view: InstanceView) -> float:
    """The prompts before it, at the instance's own fitted pace; a lower bound, 0 without one.

    Linear part only: what the backlog attends to is not known here. Rows that the prefix cache will save
    are taken off at the rate at which it saved them so far.
    """
    cost = StepCost.known(view.engine.cost)
    if cost is None:
        return 0.0
    engine = view.engine
    computed = 1.0 - engine.prefix_hits / engine.prefix_queries if engine.prefix_queries else 1.0
    return cost.step_ms(view.backlog_tokens * computed, 0, 0, 0) / 1000 if view.backlog_tokens else 0.0
