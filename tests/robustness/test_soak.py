"""Minutes of mixed load on the real model: what a request gets does not depend on its company.

Random prompts, lengths, seeds, choices and stop strings; one client in five leaves early. Every answer
that came to its end is asked for again at the end, alone, and must be the same text.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from xllm.testing.server_process import ServerProcess, serve

SEED = 20_261_123
LOAD_S = 150.0
NUM_CLIENTS = 12
NUM_REPLAYED = 60
WORDS = "the a of river stone king light under seven green and was then who sang over old road".split()


@dataclass
class Seen:
    """What came back: bodies with their complete answers, and how many clients left."""

    answers: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    num_left: int = 0
    num_refused: int = 0


def random_body(rng: random.Random) -> dict[str, Any]:
    prompt = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 120, 300])))
    shared = "You are a careful and friendly assistant who answers in one sentence. " * rng.choice([0, 6])
    body: dict[str, Any] = {
        "model": "smollm2",
        "prompt": shared + prompt,
        "max_tokens": rng.randint(1, 48),
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "seed": rng.randint(0, 2**31),
        "n": rng.choice([1, 1, 1, 2]),
    }
    if rng.random() < 0.3:
        body["stop"] = [rng.choice(WORDS)]
    if rng.random() < 0.3:
        body["presence_penalty"] = 0.5
    return body


async def client(http: httpx.AsyncClient, rng: random.Random, until_s: float, seen: Seen) -> None:
    while time.monotonic() < until_s:
        body = random_body(rng)
        leave_after = rng.randint(0, 10) if rng.random() < 0.2 else None
        texts = await ask(http, body, leave_after)
        if texts is None:
            seen.num_left += 1
        elif texts:
            seen.answers.append((body, texts))
        else:
            seen.num_refused += 1
            await asyncio.sleep(0.2)


async def ask(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> list[str] | None:
    """Texts by choice; None = left early, [] = refused with 429."""
    texts = [""] * body["n"]
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code == 429:
            return []
        assert response.status_code == 200, await response.aread()
        num_events = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return texts
            if num_events == leave_after:
                return None
            num_events += 1
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["text"]
    raise AssertionError("a stream ended without [DONE]")


async def load(server: ServerProcess, seconds: float, seed: int) -> Seen:
    seen = Seen()
    limits = httpx.Limits(max_connections=NUM_CLIENTS + 2)
    async with httpx.AsyncClient(
        base_url=server.base_url, timeout=300, limits=limits, trust_env=False
    ) as http:
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for i in range(NUM_CLIENTS):
                group.create_task(client(http, random.Random(seed + i), until_s, seen))
    return seen


def rss_bytes(server: ServerProcess) -> int:
    front = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (front, *front.children(recursive=True)))


def wait_idle(server: ServerProcess) -> None:
    end = time.monotonic() + 30
    while server.metric("xllm:owned_pages") + server.metric("xllm:inflight_requests"):
        assert time.monotonic() < end, server.metrics()
        time.sleep(0.05)


@pytest.mark.robustness
@pytest.mark.timeout(900)
def test_mixed_load_is_exact_and_leaves_nothing(smollm2: str) -> None:
    # Few pages, so that the load lives on preemption and eviction.
    flags = ("--max-model-len", "1024", "--num-pages", "20", "--max-num-seqs", "8")
    with serve(smollm2, *flags, "--max-num-queued-reqs", "8") as server:
        warm = asyncio.run(load(server, 30.0, SEED + 1000))
        wait_idle(server)
        before = rss_bytes(server)
        seen = asyncio.run(load(server, LOAD_S, SEED))
        wait_idle(server)
        after = rss_bytes(server)
        num_preemptions = server.metric("vllm:num_preemptions_total")
        hits = server.metric("vllm:prefix_cache_hits_total")
        print(
            f"seed {SEED}: {len(warm.answers) + len(seen.answers)} answers, {seen.num_left} left, "
            f"{seen.num_refused} refused, {num_preemptions:.0f} preemptions, {hits:.0f} cached tokens, "
            f"RSS {before >> 20} → {after >> 20} MiB"
        )
        assert num_preemptions > 0
        assert hits > 0
        assert seen.num_left > 0
        assert after <= before * 1.05
        replayed = random.Random(SEED).sample(seen.answers, min(NUM_REPLAYED, len(seen.answers)))
        for body, texts in replayed:
            answer = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120).json()
            assert [c["text"] for c in answer["choices"]] == texts, body
