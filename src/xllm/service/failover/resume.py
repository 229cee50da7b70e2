"""Requests without an instance, and how many each instance is still catching up on.

Oldest first; an instance takes over a few at a time, the rest wait for its first answers, so that a death
is not followed by a stampede of recomputation. Pure bookkeeping; placing is the router's.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_REFUSALS = 8
"""After so many refusals by instances a request that has not begun anywhere is refused itself."""

_RETRY_S = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Pause before the next try after the nth refusal in a row."""


def retry_delay_s(num_refusals: int) -> float:
    return _RETRY_S[min(num_refusals, len(_RETRY_S)) - 1] if num_refusals > 0 else 0.0


@dataclass(slots=True)
class _Waiting:
    age: int
    not_before_s: float = 0.0
    alone_since_s: float | None = None


class ResumeQueue:
    """Invariant: a request is waiting here, or catching up on one instance, or in neither set."""

    def __init__(self, max_resumes: int) -> None:
        self._max_resumes = max_resumes
        self._waiting: dict[str, _Waiting] = {}
        self._catching_up: dict[str, dict[str, bool]] = {}
        self._taken_by: dict[str, str] = {}

    # -- waiting ------------------------------------------------------------------------------------

    def wait(self, request_id: str, age: int, *, not_before_s: float = 0.0) -> None:
        """The request has no instance. Smaller ages go first; no try before `not_before_s`."""
        self.caught_up(request_id)
        self._waiting[request_id] = _Waiting(age, not_before_s)

    def due(self, now_s: float) -> tuple[str, ...]:
        """Whom to try to place now, in order."""
        ready = [(w.age, rid) for rid, w in self._waiting.items() if w.not_before_s <= now_s]
        return tuple(rid for _, rid in sorted(ready))

    def alone(self, request_id: str, now_s: float, *, alone: bool) -> None:
        """Tell whether any instance could take the request at all, now."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return
        if not alone:
            waiting.alone_since_s = None
        elif waiting.alone_since_s is None:
            waiting.alone_since_s = now_s

    def expired(self, now_s: float, grace_s: float) -> tuple[str, ...]:
        """Those that have been without any instance for longer than the grace."""
        return tuple(
            rid
            for rid, w in self._waiting.items()
            if w.alone_since_s is not None and now_s - w.alone_since_s >= grace_s
        )

    # -- catching up --------------------------------------------------------------------------------

    def has_room(self, instance: str, *, at_risk: bool) -> bool:
        """May the instance take over one more? Of those at risk (see blame) it tries one at a time."""
        catching_up = self._catching_up.get(instance)
        if not catching_up:
            return True
        return len(catching_up) < self._max_resumes and not (at_risk and any(catching_up.values()))

    def took_over(self, request_id: str, instance: str, *, at_risk: bool) -> None:
        """A waiting request was placed on the instance."""
        self._waiting.pop(request_id, None)
        self._catching_up.setdefault(instance, {})[request_id] = at_risk
        self._taken_by[request_id] = instance

    def caught_up(self, request_id: str) -> bool:
        """It has answered, or left its instance; True if that made room for another."""
        instance = self._taken_by.pop(request_id, None)
        if instance is None:
            return False
        left = self._catching_up[instance]
        del left[request_id]
        if not left:
            del self._catching_up[instance]
        return True

    def drop(self, request_id: str) -> bool:
        """The request has ended; True if that made room for another."""
        self._waiting.pop(request_id, None)
        return self.caught_up(request_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_catching_up(self) -> int:
        return len(self._taken_by)

    def is_waiting(self, request_id: str) -> bool:
        return request_id in self._waiting
