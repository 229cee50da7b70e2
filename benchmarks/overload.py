"""Ten times more requests than the server can serve, then few again: what is served, who waits how long.

Open loop: arrivals are Poisson and do not care whether the server keeps up. The engine's steps take a fixed
time and no CPU unless --model names a real one. Capacity is measured first, in a closed loop. Goodput counts
the tokens of answers that were completed: requests differ in length, and a minute has few of them.

    python -m benchmarks.overload --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.overhead.__main__ import server

SAMPLE_EVERY_S = 0.25
FILLING_S = 1.0
"""Until an overload has filled every engine."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it. Times in seconds since the start; status 0 = no connection."""

    at_s: float
    status: int
    end_s: float
    ttft_s: float | None = None
    num_tokens: int = 0
    complete: bool = False
    retry_after_s: int | None = None


@dataclass(slots=True)
class Watch:
    """The server's own numbers, sampled while the load runs."""

    max_waiting: float = 0.0
    max_inflight: float = 0.0
    max_rss_mib: float = 0.0
    first_rss_mib: float = 0.0
    num_samples: int = 0
    running: list[tuple[float, float]] = field(default_factory=list)
    """(when, requests that engines work on)."""

    def mean_running(self, begin_s: float, end_s: float) -> float:
        seen = [count for at_s, count in self.running if begin_s <= at_s < end_s]
        return sum(seen) / len(seen) if seen else 0.0


@dataclass(slots=True)
class Load:
    """A client that costs little: it counts events and looks at no text."""

    port: int
    model: str
    mean_tokens: int
    seed: int = 1
    start_s: float = field(default_factory=time.perf_counter)
    answers: list[Answer] = field(default_factory=list)
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s

    async def closed(self, seconds: float, concurrency: int) -> float:
        """Tokens of completed answers a second while `concurrency` clients ask again and again.

        The second half counts.
        """
        rng = random.Random(self.seed)
        end_s, num = self.now_s() + seconds, 0

        async def client() -> None:
            nonlocal num
            while self.now_s() < end_s:
                answer = await self._ask(rng)
                if answer.complete and end_s - seconds / 2 <= answer.end_s < end_s:
                    num += answer.num_tokens

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return num / (seconds / 2)

    async def poisson(self, seconds: float, rate_per_s: float) -> tuple[float, float]:
        """Arrivals for that long; (begin, end). What still runs at the end goes on."""
        rng = random.Random(f"{self.seed} {rate_per_s}")
        begin_s = at_s = self.now_s()
        while (at_s := at_s + rng.expovariate(rate_per_s)) < begin_s + seconds:
            await asyncio.sleep(max(0.0, at_s - self.now_s()))
            task = asyncio.create_task(self._one(rng))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return begin_s, self.now_s()

    async def finish(self) -> None:
        while self._running:
            await asyncio.wait(self._running)

    async def _one(self, rng: random.Random) -> None:
        self.answers.append(await self._ask(rng))

    async def _ask(self, rng: random.Random) -> Answer:
        num_tokens = rng.randint(self.mean_tokens // 4, self.mean_tokens * 7 // 4)
        prompt = [100 + rng.randrange(64) for _ in range(32)]
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": num_tokens,
                "ignore_eos": True,
                "stream": True,
                "temperature": 0.0,
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        at_s = self.now_s()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return Answer(at_s, 0, self.now_s())
        try:
            writer.write(head.encode() + body)
            return await self._read(at_s, num_tokens, reader)
        except (OSError, asyncio.IncompleteReadError):
            return Answer(at_s, 0, self.now_s())
        finally:
            writer.close()

    async def _read(self, at_s: float, num_asked: int, reader: asyncio.StreamReader) -> Answer:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        if status != 200:
            after = next((line for line in head.split("\r\n") if line.startswith("retry-after:")), None)
            seconds = int(after.split(":")[1]) if after else None
            return Answer(at_s, status, self.now_s(), retry_after_s=seconds)
        ttft_s, num_events, tail = None, 0, b""
        while data := await reader.read(1 << 16):
            if ttft_s is None and b"data: " in data:
                ttft_s = self.now_s() - at_s
            num_events += data.count(b"data: ")
            tail = (tail + data)[-64:]
        complete = b"data: [DONE]" in tail
        return Answer(at_s, status, self.now_s(), ttft_s, min(num_events, num_asked), complete)


async def watch(port: int, pids: list[int], load: Load, seen: Watch) -> None:
    """Sample until cancelled."""
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        while True:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
            lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            sums: Counter[str] = Counter()
            for name, value in lines:
                sums[name.split("{")[0]] += float(value)  # type: ignore[assignment]
            rss_mib = sum(map(rss_of, pids)) / 2**20
            seen.num_samples += 1
            seen.running.append((load.now_s(), sums["vllm:num_requests_running"]))
            seen.first_rss_mib = seen.first_rss_mib or rss_mib
            seen.max_rss_mib = max(seen.max_rss_mib, rss_mib)
            seen.max_waiting = max(seen.max_waiting, sums["vllm:num_requests_waiting"])
            seen.max_inflight = max(seen.max_inflight, sums["xllm:inflight_requests"])
            await asyncio.sleep(SAMPLE_EVERY_S)


def rss_of(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return 0


@dataclass(frozen=True, slots=True)
class Phase:
    """What happened to the requests that arrived in it, and what ended in it."""

    name: str
    seconds: float
    num_asked: int
    num_served: int
    statuses: dict[int, int]
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    refused_p99_s: float


def phase(name: str, answers: list[Answer], begin_s: float, end_s: float) -> Phase:
    arrived = [a for a in answers if begin_s <= a.at_s < end_s]
    tokens = sum(a.num_tokens for a in answers if a.complete and begin_s <= a.end_s < end_s)
    waits = sorted(a.ttft_s for a in arrived if a.ttft_s is not None)
    refused = sorted(a.end_s - a.at_s for a in arrived if a.status == 429)
    return Phase(
        name=name,
        seconds=end_s - begin_s,
        num_asked=len(arrived),
        num_served=sum(a.complete for a in arrived),
        statuses=dict(sorted(Counter(a.status for a in arrived).items())),
        tokens_per_s=tokens / (end_s - begin_s),
        ttft_p50_s=quantile(waits, 0.5),
        ttft_p99_s=quantile(waits, 0.99),
        refused_p99_s=quantile(refused, 0.99),
    )


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass(frozen=True, slots=True)
class Report:
    """`mean_running`: requests that engines worked on at a time, once the overload had begun.
    `recovery_s`: from the end of the overload until every later wait was normal again (`normal_s`)."""

    capacity_tokens_per_s: float
    phases: tuple[Phase, ...]
    goodput_share: float
    mean_running: float
    normal_s: float
    recovery_s: float
    retry_after_s: tuple[int, int]
    seen: Watch


async def measure(
    port: int,
    pids: list[int],
    *,
    model: str,
    seconds: float,
    normal_s: float,
    factor: float = 10.0,
    normal_load: float = 0.7,
    mean_tokens: int = 64,
    concurrency: int = 96,
    recovery_s: float = 10.0,
    capacity_s: float | None = None,
    seed: int = 1,
) -> Report:
    """Capacity, normal load, `factor` times capacity for `seconds`, normal load again.

    The last phase is what comes `recovery_s` after the overload. Capacity is measured for `capacity_s`, by
    default half of `seconds` and at least 8.
    """
    load, seen = Load(port, model, mean_tokens, seed), Watch()
    capacity_tokens = await load.closed(capacity_s or max(8.0, seconds / 2), concurrency)
    capacity = capacity_tokens / mean_tokens
    load.answers.clear()
    watching = asyncio.create_task(watch(port, pids, load, seen))
    try:
        before = await load.poisson(normal_s, normal_load * capacity)
        during = await load.poisson(seconds, factor * capacity)
        after = await load.poisson(normal_s + recovery_s, normal_load * capacity)
        await load.finish()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    phases = (
        phase("before", load.answers, *before),
        phase("overload", load.answers, *during),
        phase("after", load.answers, *after),
        phase("later", load.answers, after[0] + recovery_s, after[1]),
    )
    # Twice the slowest normal wait: what a client would still call normal.
    normal = 2 * max(a.ttft_s or 0.0 for a in load.answers if a.at_s < before[1])
    slow = [a.at_s for a in load.answers if a.at_s >= after[0] and (a.ttft_s is None or a.ttft_s > normal)]
    retry = [a.retry_after_s for a in load.answers if a.retry_after_s is not None]
    return Report(
        capacity_tokens_per_s=capacity_tokens,
        phases=phases,
        goodput_share=phases[1].tokens_per_s / capacity_tokens,
        mean_running=seen.mean_running(during[0] + FILLING_S, during[1]),
        normal_s=normal,
        recovery_s=max(slow, default=after[0]) - after[0],
        retry_after_s=(min(retry, default=0), max(retry, default=0)),
        seen=seen,
    )


def lines(report: Report) -> Iterator[str]:
    yield f"capacity {report.capacity_tokens_per_s:.0f} tokens/s (closed loop)"
    yield "phase        asked  served  tokens/s TTFT p50    p99   429 answered in p99   statuses"
    for p in report.phases:
        yield (
            f"{p.name:11s} {p.num_asked:6d}  {p.num_served:6d}  {p.tokens_per_s:8.0f} {p.ttft_p50_s:8.3f}"
            f" {p.ttft_p99_s:6.3f}   {p.refused_p99_s:8.3f} s           {p.statuses}"
        )
    seen, over = report.seen, report.phases[1]
    share = over.statuses.get(429, 0) / max(1, over.num_asked)
    yield f"goodput during the overload: {report.goodput_share:.1%} of capacity; refused {share:.1%}"
    yield f"requests that engines worked on meanwhile: {report.mean_running:.1f} at a time"
    yield f"recovery: {report.recovery_s:.1f} s until every wait was below {report.normal_s:.3f} s again"
    yield f"Retry-After from {report.retry_after_s[0]} to {report.retry_after_s[1]} s"
    yield (
        f"most waiting in engines {seen.max_waiting:.0f}, most in flight {seen.max_inflight:.0f}, "
        f"RSS {seen.first_rss_mib:.0f} to {seen.max_rss_mib:.0f} MiB ({seen.num_samples} samples)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--normal-seconds", type=float, default=30.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--mean-tokens", type=int, default=64)
    parser.add_argument("--model", help="a real model instead of the sleeping engine")
    parser.add_argument("--serve-args", default="", help="more arguments of xllm serve, in one string")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with server(args.step_ms, args.model, args.serve_args.split()) as (port, front, engine):
        report = asyncio.run(
            measure(
                port,
                [front, engine],
                model="paced",
                seconds=args.seconds,
                normal_s=args.normal_seconds,
                factor=args.factor,
                mean_tokens=args.mean_tokens,
                seed=args.seed,
            )
        )
    for line in lines(report):
        print(line, flush=True)
    later = report.phases[3]
    good = report.goodput_share >= 0.9 and report.recovery_s <= 10.0 and later.num_served == later.num_asked
    print("as promised" if good else "NOT as promised: goodput >= 90 %, normal again within 10 s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
