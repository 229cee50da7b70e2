"""The front's spans of each traced request: told as its parts end.

request ⊃ place, queue, prefill, decode, move. The engines' own spans hang under the same request
span, by the trace context that travels in `RequestSpec.trace`. No text, no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.clock import Clock
from xllm.observability.tracing import Span, SpanContext, Tracer, Value, parse_traceparent
from xllm.service.draft import RequestDraft
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.router.base import Placement
from xllm.service.snapshot import NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.types import FinishReason, RequestSpec

MAX_SPANS = 64
_GOOD = frozenset({FinishReason.STOP.value, FinishReason.LENGTH.value})


@dataclass(slots=True)
class _Open:
    """What is known of a traced request. Times are seconds of the front's clock."""

    context: SpanContext
    parent_id: str | None
    client_id: str
    start_s: float
    placed_s: float | None = None
    first_s: float | None = None
    last_s: float = 0.0
    queue_s: float = 0.0
    moving: tuple[str, str, str] | None = None
    num_spans: int = 0


class RequestSpans(NullObserver):
    """A `FrontObserver`; requests without a trace cost one dictionary look-up an event."""

    def __init__(self, tracer: Tracer, clock: Clock) -> None:
        self._tracer, self._clock = tracer, clock
        self._open: dict[str, _Open] = {}
        # One anchor: spans of one process never contradict each other when the wall clock is set.
        self._anchor_s = clock.wall_s() - clock.monotonic_s()

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        context = parse_traceparent(spec.trace)
        if context is None:
            return
        now_s = self._clock.monotonic_s()
        start_s = now_s if draft.received_s is None else min(now_s, draft.received_s)
        self._open[spec.request_id] = _Open(
            context, draft.trace_parent, draft.client_id, start_s, last_s=now_s
        )

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        if (request := self._open.get(request_id)) is None:
            return
        now_s = self._clock.monotonic_s()
        facts: dict[str, Value] = {
            "xllm.instance": placement.instance,
            "xllm.attempt": attempt,
            "xllm.reasons": ",".join(placement.reasons),
        }
        if placement.ttft_ms is not None:
            facts["xllm.predicted_ttft_ms"] = placement.ttft_ms
        start_s = request.start_s if request.placed_s is None else now_s
        self._add(request, "place", start_s, now_s, facts)
        if attempt and request.moving is None:
            request.moving = ("", placement.instance, "")
        request.placed_s = now_s

    def on_first(self, request_id: str, queue_s: float) -> None:
        if (request := self._open.get(request_id)) is not None:
            request.queue_s = queue_s

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        request = self._open.get(request_id) if self._open else None
        if request is None:
            return
        now_s = self._clock.monotonic_s()
        if request.first_s is None:
            self._waited(request, now_s)
            request.first_s = now_s
        if request.moving is not None:
            source, target, cause = request.moving
            request.moving = None
            facts: dict[str, Value] = {"xllm.from": source, "xllm.to": target, "xllm.cause": cause}
            self._add(request, "move", request.last_s, now_s, facts)
        request.last_s = now_s

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        if (request := self._open.get(request_id)) is not None:
            request.moving = (source, target, cause)

    def on_handover(self, record: HandoverRecord) -> None:
        if record.outcome == "done" and (request := self._open.get(record.request_id)) is not None:
            request.moving = (record.source, record.target, f"handover_{record.reason}")

    def on_ended(self, record: RequestRecord) -> None:
        request = self._open.pop(record.request_id, None)
        if request is None:
            return
        now_s = self._clock.monotonic_s()
        if request.first_s is not None:
            self._add(request, "decode", request.first_s, now_s, {})
        elif request.placed_s is not None:
            self._waited(request, now_s)
        facts: dict[str, Value] = {
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": record.usage.completion_tokens,
            "xllm.usage.cached_tokens": record.usage.cached_tokens,
            "xllm.request_id": record.request_id,
            "xllm.client_id": request.client_id,
            "xllm.instance": record.instance,
            "xllm.outcome": record.outcome,
        }
        span = Span(
            name="request",
            context=request.context,
            parent_id=request.parent_id,
            start_ns=self._ns(request.start_s),
            end_ns=self._ns(now_s),
            attributes=facts,
            is_server=True,
            failed=record.outcome not in _GOOD,
        )
        self._tracer.add(span)

    def _waited(self, request: _Open, now_s: float) -> None:
        start_s = now_s if request.placed_s is None else request.placed_s
        computing_s = min(now_s, start_s + request.queue_s)
        self._add(request, "queue", start_s, computing_s, {})
        self._add(request, "prefill", computing_s, now_s, {})

    def _add(self, request: _Open, name: str, start_s: float, end_s: float, facts: dict[str, Value]) -> None:
        if request.num_spans >= MAX_SPANS:
            return
        request.num_spans += 1
        self._tracer.add(
            Span(
                name=name,
                context=request.context.child(),
                parent_id=request.context.span_id,
                start_ns=self._ns(start_s),
                end_ns=self._ns(end_s),
                attributes=facts,
            )
        )

    def _ns(self, seconds: float) -> int:
        return int((seconds + self._anchor_s) * 1e9)
