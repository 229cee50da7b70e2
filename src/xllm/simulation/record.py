"""What a run leaves behind for the oracle: outcomes, the front's last state, what the engines held.

Values and small questions about the timeline; nothing is judged here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm.service.snapshot import FrontSnapshot, NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.simulation.client import Outcome
from xllm.simulation.golden import Output
from xllm.types import RequestSpec


class Observer(NullObserver):
    """Counts endings, and tells the event log."""

    def __init__(self, log: Callable[..., None]) -> None:
        self.num_ended: Counter[str] = Counter()
        self.records: list[RequestRecord] = []
        self._log = log

    def on_delta(self, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        self._log("delta", delta.choice, delta.token_ids, delta.text, delta.finish_reason)

    def on_ended(self, record: RequestRecord) -> None:
        self._log("ended", record.request_id, record.outcome, record.instance)
        self.num_ended[record.request_id] += 1
        self.records.append(record)


class Usable:
    """When each instance could be placed on, as the faults have it: the excuse for "no instance"."""

    def __init__(self) -> None:
        self._changes: dict[str, list[tuple[float, bool]]] = {}

    def note(self, name: str, now_s: float, usable: bool) -> None:
        self._changes.setdefault(name, []).append((now_s, usable))

    def throughout(self, start_s: float, end_s: float) -> bool:
        """Whether some instance was usable all the time between the two."""
        return any(_throughout(changes, start_s, end_s) for changes in self._changes.values())


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
    usable: Usable = field(default_factory=Usable)
    settle_s: float = 1.0
    may_be_full: bool = False
    num_losses: int = 0

    def was_without_instance(self, at_s: float) -> bool:
        return not self.usable.throughout(at_s - self.settle_s, at_s)
