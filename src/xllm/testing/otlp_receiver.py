"""An OTLP/HTTP trace receiver in a thread: what a collector would have been told. Needs the extra `otel`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any]


class OtlpReceiver:
    """`hold()` makes it take connections and answer nothing until `release()`."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        self._decode = trace_service_pb2.ExportTraceServiceRequest.FromString
        self._spans: list[Received] = []
        self._news = threading.Condition()
        self._open = threading.Event()
        self._open.set()
        self.num_requests = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver._take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def wait_for(self, enough: Callable[[list[Received]], bool], timeout_s: float = 30.0) -> list[Received]:
        """All spans, once `enough` holds for them."""
        with self._news:
            if not self._news.wait_for(lambda: enough(self._spans), timeout_s):
                raise AssertionError(f"not told: {[(s.service, s.name) for s in self._spans]}")
            return list(self._spans)

    def wait_requests(self, count: int, timeout_s: float = 30.0) -> None:
        with self._news:
            if not self._news.wait_for(lambda: self.num_requests >= count, timeout_s):
                raise AssertionError("no export came")

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        with self._news:
            self.num_requests += 1
            self._news.notify_all()
        self._open.wait(60)
        message = self._decode(body)
        with self._news:
            for part in message.resource_spans:
                service = _attributes(part.resource.attributes)["service.name"]
                for scope in part.scope_spans:
                    self._spans.extend(_received(span, service) for span in scope.spans)
            self._news.notify_all()


def _received(span: Any, service: str) -> Received:
    return Received(
        name=span.name,
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        failed=span.status.code == 2,
        attributes=_attributes(span.attributes),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {p.key: getattr(p.value, p.value.WhichOneof("value")) for p in pairs}
