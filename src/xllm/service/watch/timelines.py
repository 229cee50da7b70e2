"""The timelines of live requests and of the last ended ones, found by any name a request has.

A `FrontObserver` on the front's loop. Bounded by requests and by facts, whatever clients and policies do.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from xllm.clock import Clock
from xllm.service.draft import RequestDraft
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceState
from xllm.service.router.base import Placement
from xllm.service.snapshot import NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.service.watch.timeline import Timeline
from xllm.types import RequestSpec

MAX_ENDED = 4096
MAX_FACTS = 400_000
"""Over all ended requests; a fact is a name and a number or a short text (measured: 0014)."""
MAX_INSTANCE_EVENTS = 256
COMPLETION_PREFIXES = ("chatcmpl-", "cmpl-")


class Timelines(NullObserver):
    """Live ones are bounded by admission; ended ones leave oldest first."""

    def __init__(self, clock: Clock, *, max_ended: int = MAX_ENDED, max_facts: int = MAX_FACTS) -> None:
        self._clock = clock
        self._max_ended, self._max_facts = max_ended, max_facts
        self._live: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()
        self._of_client: dict[str, list[str]] = {}
        self._num_facts = 0
        self.instance_events: deque[tuple[float, str, str, str, float]] = deque(maxlen=MAX_INSTANCE_EVENTS)
        """(Unix time, name, state, reason, seconds after its last progress)."""

    def find(self, name: str) -> list[dict[str, Any]]:
        """What is known of a request by its own id, its completion id or the client's id; newest first."""
        for prefix in COMPLETION_PREFIXES:
            name = name.removeprefix(prefix)
        found = self._get(name)
        timelines = [found] if found else [self._get(i) for i in reversed(self._of_client.get(name, ()))]
        now_s = self._clock.monotonic_s()
        return [t.explain(now_s) for t in timelines if t is not None]

    @property
    def num_kept(self) -> int:
        return len(self._live) + len(self._ended)

    # -- FrontObserver ----------------------------------------------------------------------------

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        now_s = self._clock.monotonic_s()
        start_s = now_s if draft.received_s is None else min(now_s, draft.received_s)
        timeline = Timeline(
            spec.request_id,
            client_id=draft.client_id,
            model=spec.model,
            num_prompt_tokens=len(draft.prompt_token_ids),
            start_s=start_s,
            created_s=self._clock.wall_s() - (now_s - start_s),
        )
        timeline.submitted(now_s)
        self._live[spec.request_id] = timeline
        if draft.client_id:
            self._of_client.setdefault(draft.client_id, []).append(spec.request_id)

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        if timeline := self._live.get(request_id):
            timeline.placed(self._clock.monotonic_s(), placement, attempt)

    def on_first(self, request_id: str, queue_s: float) -> None:
        if timeline := self._live.get(request_id):
            timeline.queued(queue_s)

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        if timeline := self._live.get(request_id):
            num_tokens = len(delta.token_ids) if delta.choice == 0 else 0
            timeline.output(self._clock.monotonic_s(), num_tokens)

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        if timeline := self._live.get(request_id):
            timeline.moved(self._clock.monotonic_s(), source, target, cause, gap_s, cost)

    def on_handover(self, record: HandoverRecord) -> None:
        if timeline := self._live.get(record.request_id):
            timeline.handed_over(self._clock.monotonic_s(), record)

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        self.instance_events.append((self._clock.wall_s(), name, state, reason, detect_s))
        now_s = self._clock.monotonic_s()
        for timeline in self._live.values():
            if timeline.instance == name:
                timeline.instance_state(now_s, name, state, reason)

    def on_ended(self, record: RequestRecord) -> None:
        timeline = self._live.pop(record.request_id, None)
        if timeline is None:
            return
        timeline.ended(self._clock.monotonic_s(), record)
        self._ended[timeline.request_id] = timeline
        self._num_facts += timeline.num_facts
        while len(self._ended) > self._max_ended or self._num_facts > self._max_facts:
            self._forget()

    # -- inside -----------------------------------------------------------------------------------

    def _get(self, request_id: str) -> Timeline | None:
        return self._live.get(request_id) or self._ended.get(request_id)

    def _forget(self) -> None:
        _, oldest = self._ended.popitem(last=False)
        self._num_facts -= oldest.num_facts
        ids = self._of_client.get(oldest.client_id)
        if ids is not None:
            ids.remove(oldest.request_id)
            if not ids:
                del self._of_client[oldest.client_id]
