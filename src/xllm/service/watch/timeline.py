"""One request's way through the service: what happened when, and where its time was spent.

Pure: every call brings its time. Ids, names, counts and times only; never text or tokens of a prompt.
"""

from __future__ import annotations

from typing import Any

from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.router.base import Placement
from xllm.service.snapshot import RequestRecord

PHASES = ("admission", "queue", "prefill", "decode", "stalls", "moves")
"""Where time goes; together they are the whole, from the first byte to the end.

admission: reading, tokenising, checks, the choice of an instance. queue, prefill: of the attempt that
answered. decode: between outputs. stalls: what an output took beyond its usual pace when that was far more.
moves: from the last output (or the placement) on a lost instance to the next one (or the next placement).
"""

MAX_EVENTS = 64
MAX_SCORES = 16
STALL_FLOOR_S = 0.25
STALL_FACTOR = 4.0
_PACE_WEIGHT = 0.1


class Timeline:
    """Invariant: the phases sum to `_at_s` − `start_s`, whatever came in which order."""

    __slots__ = (
        "_at_s",
        "_moving",
        "_pace_s",
        "_queue_s",
        "attempt",
        "client_id",
        "created_s",
        "events",
        "first_s",
        "instance",
        "model",
        "num_facts",
        "num_left_out",
        "num_output_tokens",
        "num_prompt_tokens",
        "outcome",
        "phases",
        "placed_s",
        "predicted",
        "record",
        "request_id",
        "start_s",
    )

    def __init__(
        self,
        request_id: str,
        *,
        client_id: str,
        model: str,
        num_prompt_tokens: int,
        start_s: float,
        created_s: float,
    ) -> None:
        self.request_id, self.client_id, self.model = request_id, client_id, model
        self.num_prompt_tokens = num_prompt_tokens
        self.start_s, self.created_s = start_s, created_s
        self.instance, self.attempt = "", 0
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.num_facts = self.num_left_out = self.num_output_tokens = 0
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.placed_s: float | None = None
        self.first_s: float | None = None
        self.predicted: tuple[float | None, float | None] = (None, None)
        self.record: RequestRecord | None = None
        self._at_s = start_s
        self._moving = False
        self._pace_s: float | None = None
        self._queue_s = 0.0

    # -- what happens ---------------------------------------------------------------------------

    def submitted(self, now_s: float) -> None:
        self._note(now_s, "submitted", prompt_tokens=self.num_prompt_tokens)

    def placed(self, now_s: float, placement: Placement, attempt: int) -> None:
        if self.placed_s is None:
            self._spend("admission", now_s)
            self.predicted = (placement.ttft_ms, placement.tpot_ms)
        elif self.first_s is None:
            self._spend("moves", now_s)
        else:
            self._moving = True  # until the next output: recomputing is part of the move
        self.placed_s, self.instance, self.attempt = now_s, placement.instance, attempt
        best = sorted(placement.scores, key=lambda score: -score[1])
        facts: dict[str, Any] = {
            "instance": placement.instance,
            "attempt": attempt,
            "reasons": list(placement.reasons),
            "scores": {name: score for name, score in best[:MAX_SCORES]},
        }
        if len(best) > MAX_SCORES:
            facts["scores_left_out"] = len(best) - MAX_SCORES
        if placement.decode is not None:
            facts["decode"] = placement.decode
        if placement.ttft_ms is not None:
            facts["predicted_ttft_ms"] = round(placement.ttft_ms, 3)
        if placement.tpot_ms is not None:
            facts["predicted_tpot_ms"] = round(placement.tpot_ms, 3)
        self._note(now_s, "placed", **facts)

    def output(self, now_s: float, num_tokens: int) -> None:
        """Once a step: a few additions. `num_tokens` are those of the first choice."""
        self.num_output_tokens += num_tokens
        gap_s = now_s - self._at_s
        if self.first_s is None:
            self._first(now_s, gap_s)
        elif self._moving:
            self._moving = False
            self.phases["moves"] += gap_s
            self._note(now_s, "resumed", instance=self.instance, attempt=self.attempt, gap_ms=_ms(gap_s))
        else:
            usual_s = self._pace_s
            if usual_s is not None and gap_s > STALL_FLOOR_S and gap_s > STALL_FACTOR * usual_s:
                self.phases["decode"] += usual_s
                self.phases["stalls"] += gap_s - usual_s
                self._note(now_s, "stalled", instance=self.instance, gap_ms=_ms(gap_s), usual_ms=_ms(usual_s))
            else:
                self.phases["decode"] += gap_s
                self._pace_s = gap_s if usual_s is None else usual_s + _PACE_WEIGHT * (gap_s - usual_s)
        self._at_s = now_s

    def queued(self, queue_s: float) -> None:
        """What the engine says of its queue; comes before the output it belongs to."""
        self._queue_s = queue_s

    def handed_over(self, now_s: float, record: HandoverRecord) -> None:
        facts: dict[str, Any] = {"from": record.source, "to": record.target, "reason": record.reason}
        if record.outcome == "done":
            facts["bytes"] = record.num_bytes
            facts["transfer_ms"] = round(record.transfer_ms, 3)
            facts["exposed_ms"] = round(record.exposed_ms, 3)
            self._note(now_s, "handed over", mode=record.mode, **facts)
        else:
            self._note(now_s, "not handed over", outcome=record.outcome, code=record.code, **facts)

    def moved(self, now_s: float, source: str, target: str, cause: str, gap_s: float, cost: MoveCost) -> None:
        facts: dict[str, Any] = {"from": source, "to": target, "cause": cause, "gap_ms": _ms(gap_s)}
        facts["recompute_tokens"] = cost.recompute_tokens
        for name, ms in (("recompute_ms", cost.recompute_ms), ("migrate_ms", cost.migrate_ms)):
            if ms is not None:
                facts[f"predicted_{name}"] = round(ms, 3)
        self._note(now_s, "moved", **facts)

    def instance_state(self, now_s: float, name: str, state: str, reason: str) -> None:
        self._note(now_s, f"instance {state}", instance=name, reason=reason)
        self._moving = self._moving or (self.first_s is not None and state in ("lost", "suspect"))

    def ended(self, now_s: float, record: RequestRecord) -> None:
        self.record = record
        if self.placed_s is None:
            self._spend("admission", now_s)
        elif self.first_s is None:
            self._split_wait(now_s - self._at_s)
        else:
            self._spend("moves" if self._moving else "decode", now_s)
        self._at_s = now_s
        self._note(now_s, "ended", outcome=record.outcome, completion_tokens=record.usage.completion_tokens)

    # -- what is asked --------------------------------------------------------------------------

    def explain(self, now_s: float) -> dict[str, Any]:
        """Everything as JSON values. Of a running request the time since its last output is `waiting`."""
        record = self.record
        spent = {name: _ms(seconds) for name, seconds in self.phases.items()}
        end_s = self._at_s if record is not None else now_s
        if record is None:
            spent["waiting"] = _ms(now_s - self._at_s)
        return {
            "id": self.request_id,
            "client_id": self.client_id,
            "model": self.model,
            "created": round(self.created_s, 3),
            "state": "running" if record is None else "ended",
            "outcome": None if record is None else record.outcome,
            "instance": self.instance,
            "attempts": self.attempt + 1 if self.placed_s is not None else 0,
            "tokens": {
                "prompt": self.num_prompt_tokens,
                "cached": None if record is None else record.usage.cached_tokens,
                "completion": None if record is None else record.usage.completion_tokens,
            },
            "spent_ms": {**spent, "total": _ms(end_s - self.start_s)},
            "predicted": {"ttft_ms": self.predicted[0], "tpot_ms": self.predicted[1]},
            "seen": self._seen(),
            "events": [{"t_ms": _ms(t - self.start_s), "kind": k, **facts} for t, k, facts in self.events],
            "events_left_out": self.num_left_out,
        }

    # -- inside ---------------------------------------------------------------------------------

    def _first(self, now_s: float, wait_s: float) -> None:
        self.first_s = now_s
        self._split_wait(wait_s)
        queue_ms, prefill_ms = _ms(min(wait_s, self._queue_s)), _ms(max(0.0, wait_s - self._queue_s))
        facts = {"queue_ms": queue_ms, "prefill_ms": prefill_ms}
        self._note(now_s, "first output", instance=self.instance, attempt=self.attempt, **facts)

    def _split_wait(self, wait_s: float) -> None:
        queue_s = min(wait_s, self._queue_s)
        self.phases["queue"] += queue_s
        self.phases["prefill"] += wait_s - queue_s

    def _seen(self) -> dict[str, float | None]:
        """Comparable with the prediction, which counts from the first placement; and what the client saw."""
        seen: dict[str, float | None] = {"ttft_ms": None, "tpot_ms": None, "client_ttft_ms": None}
        if self.first_s is not None:
            seen["ttft_ms"] = _ms(self.first_s - self.start_s - self.phases["admission"])
            seen["client_ttft_ms"] = _ms(self.first_s - self.start_s)
            if self.num_output_tokens > 1:
                seen["tpot_ms"] = _ms((self._at_s - self.first_s) / (self.num_output_tokens - 1))
        return seen

    def _spend(self, phase: str, now_s: float) -> None:
        self.phases[phase] += now_s - self._at_s
        self._at_s = now_s

    def _note(self, now_s: float, kind: str, **facts: Any) -> None:
        # The end is always told; what is left out before it is counted.
        if len(self.events) >= MAX_EVENTS and kind != "ended":
            self.num_left_out += 1
            return
        self.events.append((now_s, kind, facts))
        self.num_facts += 2 + len(facts) + len(facts.get("scores", ())) + len(facts.get("reasons", ()))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
