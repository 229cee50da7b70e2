"""A hundred kills and twenty zombies under 32 streams, and a minute of prefill without a false alarm."""

from __future__ import annotations

import asyncio
import json
import random
import time

import httpx
import pytest

from benchmarks.faults import faults
from benchmarks.faults.report import summary
from benchmarks.faults.run import ENVIRONMENT, golden, killer, stopper, under_faults
from benchmarks.faults.streams import WORDS, bodies
from xllm.testing.server_process import ServerProcess, serve

FLAGS = ("--max-model-len", "1024", "--num-pages", "400", "--instances", "mixed:3")


@pytest.mark.robustness
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("kind", "count"), [("kill", 100), ("stop", 20)])
def test_faults_at_random_moments_change_no_answer(smollm2: str, kind: str, count: int) -> None:
    asked = bodies(smollm2, 48, 7)
    with serve(smollm2, *FLAGS, env=ENVIRONMENT) as server:
        faults.wait_ready(server.base_url, 3)
        wanted = asyncio.run(golden(server.base_url, asked))
        inject = killer(server.base_url) if kind == "kill" else stopper(server.base_url, 4.0)
        run = under_faults(server.base_url, asked, wanted, inject, num_faults=count, num_streams=32, seed=3)
        outcome = asyncio.run(run)
        print(json.dumps(summary(outcome)))
        assert len(outcome.faults_s) == count
        assert outcome.problems() == []
        faults.wait_ready(server.base_url, 3)


@pytest.mark.robustness
@pytest.mark.timeout(600)
def test_full_prefill_load_raises_no_suspicion(smollm2: str) -> None:
    with serve(smollm2, *FLAGS, "--no-enable-prefix-caching") as server:
        pids = {e.pid for e in faults.wait_ready(server.base_url, 3)}
        asyncio.run(prefill(server, smollm2, 60.0))
        assert {e.pid for e in faults.wait_ready(server.base_url, 3)} == pids
        assert server.count("xllm:instance_suspicions_total") == 0
        assert server.count("xllm:requests_moved_total") == 0


async def prefill(server: ServerProcess, model: str, seconds: float) -> None:
    end_s = time.monotonic() + seconds

    async def one(http: httpx.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < end_s:
            one = {"model": model, "prompt": " ".join(rng.choices(WORDS, k=700)), "max_tokens": 2}
            answer = await http.post("/v1/completions", json=one)
            assert answer.status_code in (200, 429), answer.text

    limits = httpx.Limits(max_connections=40)
    async with (
        httpx.AsyncClient(base_url=server.base_url, timeout=300, limits=limits, trust_env=False) as http,
        asyncio.TaskGroup() as group,
    ):
        for number in range(36):
            group.create_task(one(http, random.Random(number)))
