"""The decision log: one line per decision, with the numbers behind it and both names of the request.

The logger is `xllm.decisions`. Ids, names and numbers only.
"""

from __future__ import annotations

import logging

from xllm.observability.logs import log_event
from xllm.service.draft import RequestDraft
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceState
from xllm.service.router.base import Placement
from xllm.service.snapshot import NullObserver, RequestRecord
from xllm.service.watch.timeline import MAX_SCORES
from xllm.types import RequestSpec

log = logging.getLogger("xllm.decisions")


class DecisionLog(NullObserver):
    """Keeps the client's id and the model of each live request, for the lines that come later."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[str, str]] = {}

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        self._names[spec.request_id] = (draft.client_id, spec.model)

    def on_refused(self, draft: RequestDraft, code: str) -> None:
        log_event(log, "refuse", client=draft.client_id, code=code, prompt_tokens=len(draft.prompt_token_ids))

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        client_id, model = self._names.get(request_id, ("", ""))
        best = sorted(placement.scores, key=lambda score: -score[1])[:MAX_SCORES]
        predicted = {"ttft_ms": placement.ttft_ms, "tpot_ms": placement.tpot_ms}
        log_event(
            log,
            "place",
            request=request_id,
            client=client_id,
            model=model,
            instance=placement.instance,
            attempt=attempt,
            **({"decode": placement.decode} if placement.decode is not None else {}),
            reasons=",".join(placement.reasons),
            scores=",".join(f"{name}:{score:.6g}" for name, score in best),
            **{name: value for name, value in predicted.items() if value is not None},
        )

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        log_event(
            log,
            "move",
            request=request_id,
            client=self._names.get(request_id, ("", ""))[0],
            source=source,
            target=target,
            cause=cause,
            gap_ms=round(gap_s * 1000, 3),
            recompute_tokens=cost.recompute_tokens,
            decision=str(cost),
        )

    def on_handover(self, record: HandoverRecord) -> None:
        log_event(
            log,
            "handover",
            request=record.request_id,
            client=self._names.get(record.request_id, ("", ""))[0],
            source=record.source,
            target=record.target,
            reason=record.reason,
            mode=record.mode,
            outcome=record.outcome,
            code=record.code,
            bytes=record.num_bytes,
            transfer_ms=round(record.transfer_ms, 3),
            exposed_ms=round(record.exposed_ms, 3),
            predicted_ms=round(record.predicted_ms, 3),
            wait_ms=round(record.wait_s * 1000, 3),
        )

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        log_event(
            log, "instance", instance=name, state=state, reason=reason, detect_ms=round(detect_s * 1000, 3)
        )

    def on_role(self, name: str, old: str, new: str, reason: str, numbers: str) -> None:
        log_event(log, "role", instance=name, old=old, new=new, reason=reason, numbers=numbers)

    def on_ended(self, record: RequestRecord) -> None:
        self._names.pop(record.request_id, None)
