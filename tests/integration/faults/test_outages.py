"""No engine left, a client that stalls, a wall clock that jumps (F9, F25, F46)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.faults import faults
from benchmarks.faults.run import golden
from benchmarks.faults.streams import ask
from tests.faultlab.lab import MODEL, body, environment, flags, lab
from xllm.testing.server_process import ServerProcess, serve

STREAMS = [body(f"stream {i} " * (i + 1), max_tokens=120) for i in range(6)]
FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketime.so.1"


def wait_for(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true"
        time.sleep(0.02)


def status_of_a_new_request(server: ServerProcess) -> tuple[int, str]:
    one = {"model": MODEL, "prompt": "new", "max_tokens": 2}
    answer = httpx.post(f"{server.base_url}/v1/completions", json=one, timeout=60, trust_env=False)
    return answer.status_code, answer.json().get("error", {}).get("code", "")


@pytest.mark.slow
def test_f9_when_all_engines_die_streams_wait_and_new_requests_are_told(tmp_path: Path) -> None:
    async def scenario(server: ServerProcess) -> None:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=120, trust_env=False) as http:
            streams = [asyncio.create_task(ask(http, one)) for one in STREAMS]
            await asyncio.to_thread(
                wait_for, lambda: server.metric("vllm:generation_tokens_total") > tokens + 30
            )
            for engine in faults.ready(server.base_url):
                faults.kill(engine)
            refused = await asyncio.to_thread(status_of_a_new_request, server)
            assert refused == (503, "no_healthy_instance")
            answers = [await stream for stream in streams]
        assert [a.content() for a in answers] == [a.content() for a in wanted]

    with lab(tmp_path, instances=2, pace_ms=8) as server:
        faults.wait_ready(server.base_url, 2)
        wanted = asyncio.run(golden(server.base_url, STREAMS))
        tokens = server.metric("vllm:generation_tokens_total")
        asyncio.run(scenario(server))
        faults.wait_ready(server.base_url, 2)
        assert status_of_a_new_request(server)[0] == 200


@pytest.mark.robustness
def test_f25_a_client_that_stalls_and_reads_on_gets_everything(tmp_path: Path) -> None:
    long = body("stall", max_tokens=1900, logprobs=5, n=8, temperature=0.7)
    with lab(tmp_path, instances=1, stream_buffer_tokens=64) as server:
        (wanted,) = asyncio.run(golden(server.base_url, [long]))
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            data = json.dumps(long).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            sock.sendall(f"{head}connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
            # The engine stops at the end of its credit: nobody reads. Only then does the client go on.
            wait_for(lambda: server.metric("vllm:num_requests_running") > 0)
            stalled = _until_still(server)
            assert stalled < 2 * 8 * 1900 - 500, "nobody reads, yet everything was computed"
            received = b""
            with contextlib.suppress(ConnectionError):
                while piece := sock.recv(1 << 16):
                    received += piece
        events = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b'data: {"')]
        pieces = [c for e in events for c in e["choices"]]
        for index, choice in enumerate(wanted.choices):
            assert [t for c in pieces if c["index"] == index for t in c["token_ids"]] == choice.token_ids


def _until_still(server: ServerProcess) -> float:
    """The number of generated tokens once it no longer changes."""
    before, now = -1.0, server.metric("vllm:generation_tokens_total")
    while now != before:
        time.sleep(0.3)
        before, now = now, server.metric("vllm:generation_tokens_total")
    return now


@pytest.mark.parametrize("jump", ["+1h", "-1h", "+10y"])
def test_f46_a_wall_clock_that_jumps_changes_stamps_only(tmp_path: Path, jump: str) -> None:
    if not FAKETIME.exists():
        pytest.skip("libfaketime is not installed (Debian package faketime)")
    moved = tmp_path / "faketime"
    moved.write_text("+0")
    env = environment(4.0) | {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(moved),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }

    async def scenario(server: ServerProcess) -> None:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=120, trust_env=False) as http:
            before = (await http.post("/v1/completions", json=one)).json()["created"]
            streams = [asyncio.create_task(ask(http, each)) for each in STREAMS]
            await asyncio.to_thread(wait_for, lambda: server.metric("vllm:num_requests_running") > 0)
            moved.write_text(jump)
            answers = [await stream for stream in streams]
            after = (await http.post("/v1/completions", json=one)).json()["created"]
        assert abs(after - before) > 3000, "the clock did not jump"
        assert [a.content() for a in answers] == [a.content() for a in wanted]

    one = {"model": MODEL, "prompt": "stamp", "max_tokens": 2}
    with serve(*flags(tmp_path), "--instances", "mixed:2", env=env) as server:
        faults.wait_ready(server.base_url, 2)
        pids = {e.pid for e in faults.ready(server.base_url)}
        wanted = asyncio.run(golden(server.base_url, STREAMS))
        asyncio.run(scenario(server))
        assert {e.pid for e in faults.ready(server.base_url)} == pids, "no engine was suspected or restarted"
