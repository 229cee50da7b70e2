"""What a run leaves behind for the oracle: outcomes, the front's last state, what the engines held.

Values and small questions about the timeline; nothing is judged here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceState
from xllm.service.router.base import Placement
from xllm.service.snapshot import FrontSnapshot, NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.simulation.client import Outcome
from xllm.simulation.golden import Output
from xllm.types import RequestSpec


class Observer(NullObserver):
    """Counts endings, and tells the event log."""

    def __init__(self, log: Callable[..., None], now_s: Callable[[], float]) -> None:
        self.num_ended: Counter[str] = Counter()
        self.handovers: Counter[tuple[str, str]] = Counter()
        self.num_switches = 0
        self.gaps_s: list[float] = []
        self.detections: list[Detection] = []
        self._log = log
        self._now_s = now_s

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        self._log("delta", delta.choice, delta.token_ids, delta.text, delta.finish_reason)

    def on_ended(self, record: RequestRecord) -> None:
        self._log("ended", record.request_id, record.outcome, record.instance)
        self.num_ended[record.request_id] += 1

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        self._log("placed", request_id, placement.instance, attempt)

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        self._log("moved", request_id, source, target, cause)

    def on_role(self, name: str, old: str, new: str, reason: str, numbers: str) -> None:
        self._log("role", name, old, new, reason)
        self.num_switches += 1

    def on_handover(self, record: HandoverRecord) -> None:
        self._log("handover", record.request_id, record.source, record.target, record.outcome, record.code)
        self.handovers[record.reason, record.outcome] += 1

    def on_resumed(self, request_id: str, instance: str, gap_s: float) -> None:
        self.gaps_s.append(gap_s)

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        self._log("instance", name, state, reason, round(detect_s, 6))
        if state in ("lost", "suspect"):
            self.detections.append(Detection(self._now_s(), name, state, reason))


QUIET_BEFORE_S = 3.0
"""After a disturbance an instance is expected to be as good as new this long."""


@dataclass(frozen=True, slots=True)
class SeenFault:
    """A fault that hit. `quiet`: the instance was undisturbed before it."""

    at_s: float
    name: str
    kind: str
    lasts_s: float | None
    quiet: bool


@dataclass(frozen=True, slots=True)
class Detection:
    """The front called an instance lost or suspect."""

    at_s: float
    name: str
    state: InstanceState
    reason: str


class Timeline:
    """When which instance was there and undisturbed: the excuse for "no instance", and its limits."""

    def __init__(self) -> None:
        self.num_losses = 0
        self.faults: list[SeenFault] = []
        self._up: dict[str, bool] = {}
        self._num_bad: Counter[str] = Counter()
        self._usable: dict[str, list[tuple[float, bool]]] = {}

    def up(self, name: str, now_s: float, up: bool) -> None:
        """The front has taken the instance, or lost it."""
        self._up[name] = up
        self.num_losses += not up
        self._note(name, now_s)

    def bad(self, name: str, now_s: float, change: int) -> None:
        """A disturbance began (1) or ended (-1)."""
        self._num_bad[name] += change
        self._note(name, now_s)

    def fault(self, name: str, now_s: float, kind: str, lasts_s: float | None) -> None:
        quiet = self.usable_throughout(name, now_s - QUIET_BEFORE_S, now_s)
        self.faults.append(SeenFault(now_s, name, kind, lasts_s, quiet))
        if kind in ("crash", "cut", "drain"):
            self._up[name] = False
            self._note(name, now_s)

    @property
    def blame(self) -> float:
        """The most that the faults so far can have weighed against an innocent request (failover.blame)."""
        return sum(_BLAME.get(fault.kind, 0.5) for fault in self.faults)

    def throughout(self, start_s: float, end_s: float) -> bool:
        """Whether some instance was usable all the time between the two."""
        return any(self.usable_throughout(name, start_s, end_s) for name in self._usable)

    def usable_throughout(self, name: str, start_s: float, end_s: float) -> bool:
        return _throughout(self._usable.get(name, []), start_s, end_s)

    def _note(self, name: str, now_s: float) -> None:
        usable = self._up.get(name, False) and not self._num_bad[name]
        self._usable.setdefault(name, []).append((now_s, usable))


_BLAME = {"hang": 1.0, "repeat": 0.0, "drain": 0.0, "wall_jump": 0.0}


def _throughout(changes: list[tuple[float, bool]], start_s: float, end_s: float) -> bool:
    usable = False
    for at_s, now_usable in changes:
        if at_s > end_s:
            break
        if at_s > start_s and not (usable and now_usable):
            return False
        usable = now_usable
    return usable


@dataclass(slots=True)
class Record:
    """`settle_s`: how long an instance must have been usable before nobody may overlook it."""

    outcomes: list[Outcome]
    front: FrontSnapshot
    num_ended: Counter[str]
    golden: Callable[[RequestSpec], Output]
    engine_faults: list[str]
    timeline: Timeline = field(default_factory=Timeline)
    detections: list[Detection] = field(default_factory=list)
    ended_s: float = 0.0
    settle_s: float = 1.0
    may_be_full: bool = False
    recovery_grace_s: float = 30.0

    def was_without_instance(self, at_s: float) -> bool:
        return not self.timeline.throughout(at_s - self.settle_s, at_s)
