"""Load of many streams, faults at random moments, and the comparison with a run without faults.

The same for the tests (which assert on `Outcome`) and the benchmark (which prints it).
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.faults import faults
from benchmarks.faults.streams import Answer, BrokenStreamError, ask

Inject = Callable[[random.Random], tuple[float, float] | None]
"""Does one fault; (when, seconds until the front knew). None = not now. Runs in a thread."""

ENVIRONMENT = {**os.environ, "XLLM_MAX_QUEUE_DELAY_S": "0"}
"""For servers under faults: all streams are to be let in, however slow a machine with half its engines is."""


@dataclass(slots=True)
class Outcome:
    """What happened to all streams of a run under faults."""

    num_answers: int = 0
    broken: list[str] = field(default_factory=list)
    different: list[tuple[dict[str, Any], tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=list)
    faults_s: list[float] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    began_s: float = 0.0
    ended_s: float = 0.0

    def problems(self) -> list[str]:
        """Empty = every stream ended and was equal to its fault-free run."""
        lines = [f"broken: {line}" for line in self.broken]
        for body, wanted, got in self.different:
            lines.append(f"different: {body}\n  wanted {wanted}\n  got    {got}")
        return lines


async def golden(base_url: str, bodies: list[dict[str, Any]], concurrency: int = 8) -> list[Answer]:
    """Every body's answer without faults."""
    gate = asyncio.Semaphore(concurrency)

    async def one(http: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
        async with gate:
            return await ask(http, body)

    async with _client(base_url, concurrency) as http:
        return list(await asyncio.gather(*(one(http, body) for body in bodies)))


async def under_faults(
    base_url: str,
    bodies: list[dict[str, Any]],
    wanted: list[Answer],
    inject: Inject,
    *,
    num_faults: int,
    num_streams: int,
    seed: int,
    pause_s: float = 1.0,
    settle_s: float = 2.0,
) -> Outcome:
    """Keep `num_streams` streams going until `num_faults` faults have happened; then let them end.

    Between two faults a random time of up to `pause_s`; `settle_s` of load before the first and after
    the last one.
    """
    outcome = Outcome(began_s=time.monotonic())
    stop = asyncio.Event()
    rng = random.Random(seed)
    async with _client(base_url, num_streams) as http, asyncio.TaskGroup() as group:
        for number in range(num_streams):
            turns = random.Random(seed * 1000 + number)
            group.create_task(_worker(http, bodies, wanted, turns, stop, outcome))
        try:
            await asyncio.sleep(settle_s)
            while len(outcome.faults_s) < num_faults:
                happened = await asyncio.to_thread(inject, rng)
                if happened is not None:
                    outcome.faults_s.append(happened[0])
                    outcome.noticed_s.append(happened[1])
                if len(outcome.faults_s) % 10 == 0:
                    print(f"{len(outcome.faults_s)} faults, {outcome.num_answers} answers", flush=True)
                await asyncio.sleep(rng.random() * pause_s)
            await asyncio.sleep(settle_s)
        finally:
            stop.set()
    outcome.ended_s = time.monotonic()
    return outcome


async def _worker(
    http: httpx.AsyncClient,
    bodies: list[dict[str, Any]],
    wanted: list[Answer],
    rng: random.Random,
    stop: asyncio.Event,
    outcome: Outcome,
) -> None:
    while not stop.is_set():
        index = rng.randrange(len(bodies))
        try:
            answer = await ask(http, bodies[index])
        except BrokenStreamError as error:
            outcome.broken.append(str(error))
            continue
        outcome.num_answers += 1
        outcome.gaps_s.append(answer.longest_gap_s)
        outcome.token_times_s.extend(answer.times_s)
        if answer.content() != wanted[index].content():
            outcome.different.append((bodies[index], wanted[index].content(), answer.content()))


def killer(base_url: str, min_ready: int = 2) -> Inject:
    """SIGKILL to a random ready engine, while at least `min_ready` are."""

    def inject(rng: random.Random) -> tuple[float, float] | None:
        found = faults.ready(base_url)
        if len(found) < min_ready:
            return None
        victim = rng.choice(found)
        killed_s = faults.kill(victim)
        faults.wait_noticed(base_url, victim)
        return killed_s, time.monotonic() - killed_s

    return inject


def stopper(base_url: str, seconds: float, min_ready: int = 2) -> Inject:
    """SIGSTOP to a random ready engine, SIGCONT after `seconds`: the zombie comes back with what it had."""

    def inject(rng: random.Random) -> tuple[float, float] | None:
        found = faults.ready(base_url)
        if len(found) < min_ready:
            return None
        victim = rng.choice(found)
        stopped_s = faults.stop(victim)
        faults.wait_noticed(base_url, victim)
        noticed_s = time.monotonic() - stopped_s
        time.sleep(max(0.0, seconds - noticed_s))
        faults.carry_on(victim)
        return stopped_s, noticed_s

    return inject


def _client(base_url: str, num_streams: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=num_streams + 2)
    return httpx.AsyncClient(base_url=base_url, timeout=300, limits=limits, trust_env=False)
