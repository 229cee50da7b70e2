"""One request is one trace over front and engine; a collector that stands still costs spans, not requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.null.cli.test_serve_process import CONFIG
from xllm.artifacts.write import write_hf_dir
from xllm.observability.otlp import MAX_WAITING_SPANS, OtlpTracer, make_tracer
from xllm.observability.tracing import Span, SpanContext
from xllm.testing.otlp_receiver import OtlpReceiver, Received
from xllm.testing.server_process import serve
from xllm.testing.tiny_tokenizer import tiny_assets

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    made = OtlpReceiver()
    yield made
    made.close()


def span(name: str = "a", **more: object) -> Span:
    context = SpanContext.new()
    return Span(name=name, context=context, parent_id=None, start_ns=1, end_ns=2, **more)  # type: ignore[arg-type]


def test_a_span_arrives_as_it_was_told(receiver: OtlpReceiver) -> None:
    tracer = make_tracer(receiver.endpoint, "svc")
    root = SpanContext(TRACE, SPAN)
    child = root.child()
    facts = {"n": 3, "x": 0.5, "name": "v", "yes": True}
    tracer.add(
        Span(name="s", context=child, parent_id=SPAN, start_ns=10, end_ns=20, attributes=facts, failed=True)
    )
    tracer.close()
    (got,) = receiver.wait_for(lambda spans: len(spans) == 1)
    assert got == Received("s", "svc", TRACE, child.span_id, SPAN, 10, 20, True, facts)


def test_a_collector_that_stands_still_costs_spans_and_never_the_caller(receiver: OtlpReceiver) -> None:
    receiver.hold()
    tracer = make_tracer(receiver.endpoint, "svc")
    assert isinstance(tracer, OtlpTracer)
    tracer.add(span())
    receiver.wait_requests(1)  # the exporting thread now waits for an answer
    for _ in range(MAX_WAITING_SPANS + 7):
        tracer.add(span())
    assert tracer.num_dropped == 7
    receiver.release()
    tracer.close()
    receiver.wait_for(lambda spans: len(spans) == MAX_WAITING_SPANS + 1)


def test_a_collector_that_is_not_there_is_counted() -> None:
    tracer = make_tracer("http://127.0.0.1:9", "svc")
    assert isinstance(tracer, OtlpTracer)
    tracer.add(span())
    tracer.close(timeout_s=0.2)
    assert (tracer.num_dropped, tracer.num_exported) == (1, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_hf_dir(directory, CONFIG, {}, tiny_assets(512))
    return directory


def test_a_request_is_one_trace_over_front_and_engine(receiver: OtlpReceiver, model: Path) -> None:
    env = {**os.environ, "XLLM_OTLP_ENDPOINT": receiver.endpoint}
    with serve(str(model), "--platform", "null", "--served-model-name", "tiny", env=env) as server:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
        reply = httpx.post(f"{server.base_url}/v1/completions", json=body, headers=headers, timeout=30)
        assert reply.status_code == 200
        unsampled = {"traceparent": f"00-{TRACE[::-1]}-{SPAN}-00"}
        httpx.post(f"{server.base_url}/v1/completions", json=body, headers=unsampled, timeout=30)
    spans = receiver.wait_for(lambda spans: len(spans) >= 8)
    assert {s.trace_id for s in spans} == {TRACE}
    by_name = {(s.service, s.name): s for s in spans}
    assert set(by_name) == {
        *(("xllm-front", n) for n in ("request", "place", "queue", "prefill", "decode")),
        *(("xllm-engine", f"engine {n}") for n in ("queue", "prefill", "decode")),
    }
    request = by_name["xllm-front", "request"]
    assert request.parent_id == SPAN
    assert request.attributes["gen_ai.usage.output_tokens"] == 8
    assert request.attributes["xllm.client_id"] == "mine"
    assert not request.failed
    for each in spans:
        assert each is request or each.parent_id == request.span_id
        assert each.start_ns <= each.end_ns
    assert by_name["xllm-engine", "engine decode"].attributes["xllm.tokens"] == 8
    assert "hello" not in str(spans)
