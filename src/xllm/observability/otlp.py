"""Spans to an OpenTelemetry collector over OTLP/HTTP, by a thread, in batches, bounded.

Serving never waits for a collector: what does not fit into the queue, or was not taken within the time
limit, is dropped and counted. Needs the extra `otel`; nothing else in the package imports OpenTelemetry.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any
from urllib.parse import urlsplit

from xllm.errors import ConfigError
from xllm.observability.tracing import NullTracer, Span, SpanContext, Tracer
from xllm.version import __version__

log = logging.getLogger("xllm.tracing")

MAX_WAITING_SPANS = 8192
MAX_BATCH_SPANS = 512
EXPORT_EVERY_S = 0.5
"""Also bounds what is lost of a process that is killed."""
EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 3.0


def make_tracer(endpoint: str | None, service: str, instance_id: str = "") -> Tracer:
    """An `OtlpTracer` when an endpoint is set. Raises ConfigError for a bad one, or without the extra."""
    if not endpoint:
        return NullTracer()
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"otlp_endpoint is {endpoint!r}; write http://HOST:PORT of an OTLP/HTTP receiver",
            param="otlp_endpoint",
        )
    path = parts.path.rstrip("/")
    url = endpoint if path.endswith("/v1/traces") else endpoint.rstrip("/") + "/v1/traces"
    return OtlpTracer(url, service, instance_id)


class OtlpTracer:
    """`add` appends to a bounded queue; a daemon thread exports."""

    enabled = True

    def __init__(self, url: str, service: str, instance_id: str = "") -> None:
        self.num_dropped = 0
        self.num_exported = 0
        self._to_otel, self._exporter = _open_exporter(url, service, instance_id)
        self._waiting: deque[Span] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._told = False
        self._thread = threading.Thread(target=self._run, name="xllm-otlp", daemon=True)
        self._thread.start()

    def add(self, span: Span) -> None:
        if len(self._waiting) >= MAX_WAITING_SPANS or self._closing:
            self.num_dropped += 1
            return
        self._waiting.append(span)
        if len(self._waiting) >= MAX_BATCH_SPANS:
            self._wake.set()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Export what is waiting, within a time limit; idempotent."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        # The exporter may be between two tries: this ends its waiting, and the rest counts as lost.
        self._exporter.shutdown()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(EXPORT_EVERY_S)
            self._wake.clear()
            self._export_waiting()
        self._export_waiting()
        self._exporter.shutdown()

    def _export_waiting(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH_SPANS, len(self._waiting)))]
            try:
                result = self._exporter.export([self._to_otel(span) for span in batch])
                taken = result.name == "SUCCESS"
            except Exception:  # noqa: BLE001  a collector's trouble is never ours
                taken = False
            if taken:
                self.num_exported += len(batch)
            else:
                self._lost(len(batch))

    def _lost(self, num_spans: int) -> None:
        self.num_dropped += num_spans
        if not self._told:
            self._told = True
            log.warning("the OTLP endpoint does not take spans; they are dropped and counted")


def _open_exporter(url: str, service: str, instance_id: str) -> tuple[Any, Any]:
    """(our span → OpenTelemetry's, exporter)."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan
    except ImportError as error:
        raise ConfigError(
            "otlp_endpoint needs the OpenTelemetry packages: pip install 'xllm[otel]'", param="otlp_endpoint"
        ) from error
    # The exporter tells of every failed batch; we tell once and count the rest.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    attributes = {"service.name": service, "service.version": __version__}
    if instance_id:
        attributes["service.instance.id"] = instance_id
    resource = Resource(attributes)

    def context(of: SpanContext) -> Any:
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        return trace.SpanContext(int(of.trace_id, 16), int(of.span_id, 16), False, flags)

    def convert(span: Span) -> Any:
        parent = None
        if span.parent_id is not None:
            parent = context(SpanContext(span.context.trace_id, span.parent_id))
        status = trace.Status(trace.StatusCode.ERROR if span.failed else trace.StatusCode.UNSET)
        return ReadableSpan(
            name=span.name,
            context=context(span.context),
            parent=parent,
            resource=resource,
            attributes=span.attributes,
            kind=trace.SpanKind.SERVER if span.is_server else trace.SpanKind.INTERNAL,
            status=status,
            start_time=span.start_ns,
            end_time=span.end_ns,
        )

    return convert, OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)
