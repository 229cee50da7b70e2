"""What operators see of a failover: one trace over both engines, one timeline that adds up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faultlab.lab import body, lab
from xllm.cli.main import main
from xllm.testing.otlp_receiver import OtlpReceiver

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NUM_TOKENS = 150
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "moved-1", "x-xllm-explain": "1"}


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    made = OtlpReceiver()
    yield made
    made.close()


def pid_of(url: str, request_id: str) -> int:
    """The process that works on the request now."""
    (told,) = httpx.get(f"{url}/requests/{request_id}", timeout=10).json()["requests"]
    listed = httpx.get(f"{url}/instances", timeout=10).json()["instances"]
    (instance,) = [i for i in listed if i["id"] == told["instance"]]
    return int(instance["pid"])


def stream_and_kill(url: str, receiver: OtlpReceiver) -> tuple[list[int], dict[str, Any]]:
    """The tokens of a stream whose engine is killed in its middle, and what the last chunk explains."""
    tokens: list[int] = []
    explained: dict[str, Any] = {}
    asked = body("which way", max_tokens=NUM_TOKENS)
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=HEADERS, timeout=60) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            explained = chunk.get("xllm", explained)
            before = len(tokens)
            tokens += [t for choice in chunk["choices"] for t in choice.get("token_ids", ())]
            if before < 10 <= len(tokens):
                # What an engine has not exported dies with it: its prefill must have left first.
                receiver.wait_for(lambda spans: any(s.name == "engine prefill" for s in spans))
                os.kill(pid_of(url, "moved-1"), signal.SIGKILL)
    return tokens, explained


def test_a_failover_is_one_trace_and_one_explanation(
    receiver: OtlpReceiver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lab(tmp_path, instances=2, pace_ms=20.0, otlp_endpoint=receiver.endpoint) as server:
        tokens, explained = stream_and_kill(server.base_url, receiver)
        assert main(["explain", "moved-1", "--base-url", server.base_url]) == 0
        metrics = server.metrics()
    assert len(tokens) == NUM_TOKENS

    (told,) = explained["requests"]
    kinds = [e["kind"] for e in told["events"]]
    assert told["attempts"] == 2, kinds
    assert {"instance lost", "moved", "resumed"} <= set(kinds), kinds
    spent = dict(told["spent_ms"])
    total = spent.pop("total")
    assert sum(spent.values()) == pytest.approx(total, abs=0.1)
    assert spent["moves"] > 0
    printed = capsys.readouterr().out
    assert "attempt 1" in printed
    assert "moves" in printed
    assert metrics['xllm:requests_moved_total{cause="lost"}'] == 1
    assert metrics["xllm:move_gap_seconds_count"] == 1
    assert metrics['xllm:fault_detect_seconds_count{finding="death"}'] == 1

    spans = receiver.wait_for(lambda found: any(s.name == "request" for s in found))
    spans = receiver.wait_for(
        lambda found: len({s.attributes.get("xllm.engine_pid") for s in found} - {None}) == 2
    )
    assert {s.trace_id for s in spans} == {TRACE}
    (request,) = [s for s in spans if s.name == "request"]
    assert (request.parent_id, request.failed) == (SPAN, False)
    assert len([s for s in spans if s.name == "place"]) == 2
    (move,) = [s for s in spans if s.name == "move"]
    assert move.attributes["xllm.cause"] == "lost"
    attempts = {
        (s.attributes["xllm.attempt"], s.attributes["xllm.engine_pid"])
        for s in spans
        if s.name == "engine prefill"
    }
    assert sorted(attempt for attempt, _ in attempts) == [0, 1]
    assert len({pid for _, pid in attempts}) == 2
    assert all(s.parent_id == request.span_id for s in spans if s is not request)
