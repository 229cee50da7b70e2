"""Several observers as one. A failing observer is cut out and said once; it never costs a request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from xllm.service.draft import RequestDraft
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceState
from xllm.service.router.base import Placement
from xllm.service.snapshot import FrontObserver, NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.types import RequestSpec

log = logging.getLogger(__name__)


class FanOut:
    """Calls in the order given. Observers that do not look at deltas cost nothing per token."""

    def __init__(self, observers: Sequence[FrontObserver]) -> None:
        self._observers = tuple(observers)
        self._delta_observers = tuple(o for o in observers if _looks_at_deltas(o))

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        self._tell("on_accepted", draft, spec)

    def on_refused(self, draft: RequestDraft, code: str) -> None:
        self._tell("on_refused", draft, code)

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        self._tell("on_placed", request_id, placement, attempt)

    def on_first(self, request_id: str, queue_s: float) -> None:
        self._tell("on_first", request_id, queue_s)

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        for observer in self._delta_observers:
            try:
                observer.on_delta(request_id, model, delta, gap_s, first=first)
            except Exception:  # noqa: BLE001  looking on must never cost a request
                self._cut(observer)

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        self._tell("on_moved", request_id, source, target, cause, gap_s, cost)

    def on_handover(self, record: HandoverRecord) -> None:
        self._tell("on_handover", record)

    def on_resumed(self, request_id: str, instance: str, gap_s: float) -> None:
        self._tell("on_resumed", request_id, instance, gap_s)

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        self._tell("on_instance", name, state, reason, detect_s)

    def on_role(self, name: str, old: str, new: str, reason: str, numbers: str) -> None:
        self._tell("on_role", name, old, new, reason, numbers)

    def on_ended(self, record: RequestRecord) -> None:
        self._tell("on_ended", record)

    def _tell(self, event: str, *facts: Any) -> None:
        for observer in self._observers:
            try:
                getattr(observer, event)(*facts)
            except Exception:  # noqa: BLE001  looking on must never cost a request
                self._cut(observer)

    def _cut(self, observer: FrontObserver) -> None:
        log.exception("an observer failed and is no longer told: %s", type(observer).__name__)
        self._observers = tuple(o for o in self._observers if o is not observer)
        self._delta_observers = tuple(o for o in self._delta_observers if o is not observer)


def _looks_at_deltas(observer: FrontObserver) -> bool:
    return getattr(type(observer), "on_delta", None) is not NullObserver.on_delta
