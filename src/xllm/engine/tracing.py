"""An engine's spans of traced requests: queue, prefill and decode of each attempt it works on.

They hang under the front's request span (`RequestSpec.trace`). Queue and prefill are told at the first
output already, so that an engine that is killed has left its trace. Called on the step thread: an engine
without traced requests pays one truth test a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from xllm.config import EngineConfig
from xllm.observability.otlp import make_tracer
from xllm.observability.tracing import Span, SpanContext, Tracer, Value, parse_traceparent
from xllm.types import RequestSpec
from xllm.wire.messages import Frame

MAX_TRACED = 4096


@dataclass(slots=True)
class _Open:
    context: SpanContext
    arrived_ns: int
    first_ns: int = 0
    num_tokens: int = 0


class RequestTracer:
    """`accepted` for each request taken, `told` for each step's frames; a request's last frame ends it.

    Ids are those of a front (its number), as everywhere in an engine.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open: dict[tuple[int, str, int], _Open] = {}
        self._pid = os.getpid()

    @classmethod
    def for_config(cls, config: EngineConfig, instance_id: str = "") -> RequestTracer:
        """The one that the configuration asks for. Raises ConfigError for an endpoint that cannot work."""
        endpoint = config.observability.otlp_endpoint
        return cls(make_tracer(endpoint, "xllm-engine", instance_id or str(os.getpid())))

    def accepted(self, front: int, spec: RequestSpec) -> None:
        if spec.trace is None or not self._tracer.enabled:
            return
        context = parse_traceparent(spec.trace)
        if context is None or not context.sampled:
            return
        if len(self._open) >= MAX_TRACED:
            # Requests of a front that is gone end without a frame: the oldest make room.
            del self._open[next(iter(self._open))]
        self._open[front, spec.request_id, spec.attempt] = _Open(context, time.time_ns())

    def told(self, front: int, frames: Iterable[Frame]) -> None:
        if not self._open:
            return
        for frame in frames:
            request = self._open.get((front, frame.request_id, frame.attempt))
            if request is None:
                continue
            now_ns = time.time_ns()
            request.num_tokens += len(frame.tokens)
            if not request.first_ns and (frame.tokens or frame.last):
                self._waited(request, frame, now_ns)
            if frame.last:
                del self._open[front, frame.request_id, frame.attempt]
                facts: dict[str, Value] = {"xllm.tokens": request.num_tokens}
                if frame.error is not None:
                    facts["xllm.error"] = frame.error.code
                self._add("engine decode", request, frame, request.first_ns, now_ns, facts)

    def close(self) -> None:
        self._tracer.close()

    def _waited(self, request: _Open, frame: Frame, now_ns: int) -> None:
        computing_ns = min(now_ns, request.arrived_ns + int(frame.queue_ms * 1e6))
        self._add("engine queue", request, frame, request.arrived_ns, computing_ns, {})
        facts: dict[str, Value] = {"xllm.cached_tokens": frame.num_cached_tokens}
        self._add("engine prefill", request, frame, computing_ns, now_ns, facts)
        request.first_ns = now_ns

    def _add(
        self, name: str, request: _Open, frame: Frame, start_ns: int, end_ns: int, facts: dict[str, Value]
    ) -> None:
        ids: dict[str, Value] = {
            "xllm.request_id": frame.request_id,
            "xllm.attempt": frame.attempt,
            "xllm.engine_pid": self._pid,
        }
        self._tracer.add(
            Span(
                name=name,
                context=request.context.child(),
                parent_id=request.context.span_id,
                start_ns=start_ns,
                end_ns=end_ns,
                attributes={**ids, **facts},
                failed=frame.error is not None,
            )
        )
