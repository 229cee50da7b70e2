"""Trace context is read as W3C writes it, and a request's spans form one tree."""

from __future__ import annotations

import pytest

from xllm.errors import ConfigError
from xllm.observability.otlp import make_tracer
from xllm.observability.tracing import NullTracer, Span, SpanContext, open_request, parse_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


class Recorder(NullTracer):
    enabled = True

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, span: Span) -> None:
        self.spans.append(span)


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True),
        (f"01-{TRACE}-{SPAN}-01", True),
    ],
)
def test_valid_headers(text: str, sampled: bool) -> None:
    assert parse_traceparent(text) == SpanContext(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "garbage",
        GOOD + "-more",
        GOOD + " ",
        " " + GOOD,
        GOOD + "\n",
        GOOD.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}x-01",
        f"00-{TRACE}-{SPAN}-1",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00_{TRACE}_{SPAN}_01",
        "00-" + "\u0661" * 32 + f"-{SPAN}-01",
    ],
)
def test_anything_else_is_as_good_as_no_header(text: str | None) -> None:
    assert parse_traceparent(text) is None


def test_a_request_continues_the_callers_trace_or_begins_one() -> None:
    tracer = Recorder()
    trace, parent = open_request(tracer, GOOD)
    assert parent == SPAN
    context = parse_traceparent(trace)
    assert context is not None
    assert context.trace_id == TRACE
    assert context.span_id != SPAN
    trace, parent = open_request(tracer, "nonsense")
    assert parent is None
    assert parse_traceparent(trace) is not None
    assert open_request(tracer, f"00-{TRACE}-{SPAN}-00") == (None, None)
    assert open_request(NullTracer(), GOOD) == (None, None)


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", "/v1/traces"])
def test_an_endpoint_that_cannot_work_is_refused_at_start(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        make_tracer(endpoint, "xllm")


def test_no_endpoint_is_no_tracer() -> None:
    assert not make_tracer(None, "xllm").enabled
