"""POST /start_profile and /stop_profile on a real server: one trace of the front and every engine."""

from __future__ import annotations

import concurrent.futures
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from xllm.artifacts.resolve import resolve
from xllm.testing.server_process import serve


@pytest.fixture(scope="module")
def trace(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(reply to stop, the file) after some requests to two engines."""
    directory = tmp_path_factory.mktemp("profiles")
    env = {**os.environ, "XLLM_PROFILE_DIR": str(directory)}
    flags = ("--max-model-len", "512", "--num-pages", "40", "--instances", "mixed:2")
    with serve(smollm2, *flags, "--router-policy", "round-robin", env=env) as server:

        def post(path: str) -> httpx.Response:
            return httpx.post(server.base_url + path, timeout=60, trust_env=False)

        def ask(i: int) -> int:
            body = {"model": "smollm2", "prompt": f"{i} bottles of", "max_tokens": 6}
            url = f"{server.base_url}/v1/completions"
            return httpx.post(url, json=body, timeout=120, trust_env=False).status_code

        server.wait_line("engine-1 takes requests", timeout_s=120)
        assert post("/stop_profile").status_code == 409
        assert post("/start_profile").status_code == 200
        assert post("/start_profile").status_code == 409
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert set(threads.map(ask, range(8))) == {200}
        stopped = post("/stop_profile")
    assert stopped.status_code == 200, stopped.text
    reply = stopped.json()
    path = Path(reply["file"])
    assert path.parent == directory
    return reply, json.loads(path.read_bytes())


def events(trace: dict[str, Any], process: str, phase: str = "X") -> list[dict[str, Any]]:
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    return [e for e in trace["traceEvents"] if e["ph"] == phase and names[e["pid"]].startswith(process)]


def test_front_and_engines_are_in_one_file(trace: tuple[dict[str, Any], dict[str, Any]]) -> None:
    reply, file = trace
    assert reply["unanswered"] == []
    assert reply["dropped"] == 0
    assert set(reply["events"]) == {"front", "engine-0", "engine-1"}
    requests = [e for e in events(file, "front", "b") if e["name"] == "request"]
    assert len(requests) == 8
    assert {e["args"]["instance"] for e in requests} == {"engine-0", "engine-1"}
    assert sum(e["name"] == "/v1/completions" for e in events(file, "front", "b")) == 8
    for engine in ("engine-0", "engine-1"):
        assert {"plan", "step", "absorb", "send"} <= {e["name"] for e in events(file, engine)}


def test_events_of_a_thread_nest_and_begin_at_zero(trace: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, file = trace
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in file["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
            spans = threads.setdefault((event["pid"], event["tid"]), [])
            spans.append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        open_ends: list[float] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= begin + 0.002:
                open_ends.pop()
            assert all(end <= outer + 0.002 for outer in open_ends)
            open_ends.append(end)


def test_layers_lie_within_their_step_and_are_the_models(
    trace: tuple[dict[str, Any], dict[str, Any]], smollm2: str
) -> None:
    _, file = trace
    num_layers = resolve(smollm2, allow_pull=False).arch().num_layers
    for engine in ("engine-0", "engine-1"):
        found = events(file, engine)
        steps = [e for e in found if e["name"] == "step"]
        layers = [e for e in found if e["name"].startswith("layer ")]
        if not layers:
            pytest.skip("this platform does not tell when layers end")
        assert len(layers) == num_layers * len(steps)
        for step in steps:
            begin, end = step["ts"] - 0.002, step["ts"] + step["dur"] + 0.002
            inside = [e["name"] for e in layers if begin <= e["ts"] and e["ts"] + e["dur"] <= end]
            assert sorted(inside) == sorted(f"layer {i}" for i in range(num_layers))


def test_a_request_is_found_again_in_what_its_engine_sent(
    trace: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    _, file = trace
    for request in (e for e in events(file, "front", "b") if e["name"] == "request"):
        sends = [e for e in events(file, request["args"]["instance"]) if e["name"] == "send"]
        assert any(request["id"] in e["args"]["requests"].split() for e in sends)
