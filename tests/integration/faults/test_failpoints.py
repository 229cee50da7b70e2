"""One bad request among good ones: it crashes, hangs or raises (F11, F14, F15), and nobody else notices.

Null device, real processes. The failpoints are proven to have gone off by what the engines' processes did.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from benchmarks.faults import faults
from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer, BrokenStreamError, ask
from tests.faultlab.lab import body, lab, marked
from tests.faultlab.outside.xllm_faultlab import ABORT, HANG, RAISE
from xllm.testing.server_process import ServerProcess

GOOD = [body(f"good number {i} " * (i + 1), max_tokens=60) for i in range(6)]


async def among_good(server: ServerProcess, bad: dict[str, object]) -> tuple[list[Answer], str]:
    """Answers of the good requests that ran beside the bad one, and how the bad one ended."""
    async with httpx.AsyncClient(base_url=server.base_url, timeout=120, trust_env=False) as http:
        streams = [asyncio.create_task(ask(http, one)) for one in GOOD]
        try:
            await ask(http, bad)
            ended = "complete"
        except BrokenStreamError as error:
            ended = str(error)
        return [await stream for stream in streams], ended


def pids(server: ServerProcess) -> set[int]:
    return {engine.pid for engine in faults.engines(server.base_url)}


@pytest.mark.slow
def test_f11_a_request_that_kills_two_engines_ends_alone(tmp_path: Path) -> None:
    with lab(tmp_path, instances=3, pace_ms=4) as server:
        before = {e.pid for e in faults.wait_ready(server.base_url, 3)}
        wanted = asyncio.run(golden(server.base_url, GOOD))
        got, ended = asyncio.run(among_good(server, body("poison", seed=marked(ABORT, 3))))
        assert "request_quarantined" in ended
        after = {e.pid for e in faults.wait_ready(server.base_url, 3)}
        assert len(before - after) == 2, "exactly two engines died of it"
        assert [a.content() for a in got] == [a.content() for a in wanted]


@pytest.mark.robustness
def test_f14_a_step_that_hangs_is_found_though_the_process_lives(tmp_path: Path) -> None:
    with lab(tmp_path, instances=3, pace_ms=4, hang_kill_s=3) as server:
        before = {e.pid for e in faults.wait_ready(server.base_url, 3)}
        wanted = asyncio.run(golden(server.base_url, GOOD))
        got, ended = asyncio.run(among_good(server, body("poison", seed=marked(HANG, 3))))
        assert "request_quarantined" in ended
        assert [a.content() for a in got] == [a.content() for a in wanted]
        after = {e.pid for e in faults.wait_ready(server.base_url, 3)}
        assert len(before - after) == 2, "exactly two engines hung and were replaced"


def test_f15_a_step_that_raises_ends_its_request_only(tmp_path: Path) -> None:
    with lab(tmp_path, instances=1, pace_ms=2) as server:
        before = pids(server)
        wanted = asyncio.run(golden(server.base_url, GOOD))
        got, ended = asyncio.run(among_good(server, body("bad", seed=marked(RAISE, 3))))
        assert "error" in ended
        assert pids(server) == before
        assert [a.content() for a in got] == [a.content() for a in wanted]
