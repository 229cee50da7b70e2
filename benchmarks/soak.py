"""Mixed load with clients that leave, on the native kernels: memory by the minute, pages, replays.

    python -m benchmarks.soak --minutes 10
    python -m benchmarks.soak --edge            (30 minutes at the edge of memory)

Random prompts, lengths, seeds, choices and stop strings; few pages, so that the load lives on preemption
and eviction. At the end all pages must be accounted for and a sample of the answers, asked for again one
by one, must come out the same. Exit code 1 when one of the three does not hold. With `--edge` there are
pages for one sequence of full length while eight run: preemption never ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.compare import machine
from xllm.testing.server_process import ServerProcess, serve

WORDS = "the a of river stone king light under seven green and was then who sang over old road".split()
MAX_GROWTH = 1.05
"""Of the memory between the end of the warm-up and the end; larger is a leak."""


@dataclass(slots=True)
class Seen:
    """What came back: bodies with their complete answers, and how many clients left or were refused."""

    answers: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    num_left: int = 0
    num_refused: int = 0
    num_ended: int = 0

    def keep(self, rng: random.Random, body: dict[str, Any], texts: list[str], most: int = 2000) -> None:
        """A uniform sample: an unbounded list would be this program's own leak."""
        self.num_ended += 1
        if len(self.answers) < most:
            self.answers.append((body, texts))
        elif (place := rng.randrange(self.num_ended)) < most:
            self.answers[place] = (body, texts)


def random_body(rng: random.Random, model: str, most: int = 48) -> dict[str, Any]:
    prompt = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 120, 300])))
    shared = "You are a careful and friendly assistant who answers in one sentence. " * rng.choice([0, 6])
    body: dict[str, Any] = {
        "model": model,
        "prompt": shared + prompt,
        "max_tokens": rng.randint(1, most),
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "seed": rng.randint(0, 2**31),
        "n": rng.choice([1, 1, 1, 2]),
    }
    if rng.random() < 0.3:
        body["stop"] = [rng.choice(WORDS)]
    if rng.random() < 0.3:
        body["presence_penalty"] = 0.5
    return body


async def client(
    http: httpx.AsyncClient, rng: random.Random, model: str, until_s: float, seen: Seen, most: int
) -> None:
    while time.monotonic() < until_s:
        body = random_body(rng, model, most)
        leave_after = rng.randint(0, 10) if rng.random() < 0.2 else None
        texts = await ask(http, body, leave_after)
        if texts is None:
            seen.num_left += 1
        elif texts:
            seen.keep(rng, body, texts)
        else:
            seen.num_refused += 1
            await asyncio.sleep(0.2)


async def ask(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> list[str] | None:
    """Texts by choice; None = left early, [] = refused with 429. Raises RuntimeError when it broke."""
    texts = [""] * body["n"]
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code == 429:
            return []
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
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
    raise RuntimeError("a stream ended without [DONE]")


async def load(
    server: ServerProcess, model: str, seconds: float, seed: int, num_clients: int, most: int = 48
) -> Seen:
    """`most`: output tokens of a choice."""
    seen = Seen()
    limits = httpx.Limits(max_connections=num_clients + 2)
    until_s, began = time.monotonic() + seconds, time.monotonic()

    async def watch() -> None:
        while (left := until_s - time.monotonic()) > 1.0:
            await asyncio.sleep(min(60.0, left))
            rss, pss = memory_mib(server)
            print(
                f"{time.monotonic() - began:6.0f} s: RSS {rss:.0f} MiB, PSS {pss:.0f} MiB, "
                f"{seen.num_ended} answers, {seen.num_left} left, {seen.num_refused} refused",
                flush=True,
            )

    async with (
        httpx.AsyncClient(base_url=server.base_url, timeout=300, limits=limits, trust_env=False) as http,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(watch())
        for i in range(num_clients):
            group.create_task(client(http, random.Random(seed + i), model, until_s, seen, most))
    return seen


def memory_mib(server: ServerProcess) -> tuple[float, float]:
    """(resident, proportional size) of the front and its engine."""
    front = psutil.Process(server.pid)
    infos = [process.memory_full_info() for process in (front, *front.children(recursive=True))]
    return sum(info.rss for info in infos) / 2**20, sum(info.pss for info in infos) / 2**20


def pages(server: ServerProcess) -> dict[str, float]:
    found = server.metrics()
    return {
        state: sum(v for k, v in found.items() if k.partition("{")[0] == f"xllm:{state}_pages")
        for state in ("free", "cached", "owned")
    }


def wait_idle(server: ServerProcess, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while pages(server)["owned"] or server.metric("xllm:inflight_requests"):
        if time.monotonic() > end:
            raise SystemExit(f"requests or pages were left after {timeout_s:.0f} s: {pages(server)}")
        time.sleep(0.1)


def replay(server: ServerProcess, sample: list[tuple[dict[str, Any], list[str]]]) -> int:
    """How many answers differ when asked for again, alone."""
    differ = 0
    for body, texts in sample:
        answer = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120, trust_env=False)
        if [choice["text"] for choice in answer.json()["choices"]] != texts:
            differ += 1
            print(f"differs: {json.dumps(body)[:300]}")
    return differ


def check(args: argparse.Namespace, server: ServerProcess, total: float) -> tuple[list[str], dict[str, Any]]:
    """What did not hold, and the figures."""
    seconds = args.minutes * 60
    # A fifth of the time, so that every buffer has had its largest load before memory is compared.
    # Answers longer than prompts: sequences are let in while there is room and rob each other as they grow.
    most = 400 if args.edge else 48
    asyncio.run(load(server, args.model, seconds / 5, args.seed + 1000, args.clients, most))
    wait_idle(server)
    before = memory_mib(server)
    print(f"warm: RSS {before[0]:.0f} MiB, PSS {before[1]:.0f} MiB")
    seen = asyncio.run(load(server, args.model, seconds, args.seed, args.clients, most))
    wait_idle(server)
    after, left = memory_mib(server), pages(server)
    sample = random.Random(args.seed).sample(seen.answers, min(args.replays, len(seen.answers)))
    differ = replay(server, sample)
    print(
        f"{seen.num_ended} answers, {seen.num_left} clients left, {seen.num_refused} refused, "
        f"{server.metric('vllm:num_preemptions_total'):.0f} preemptions, "
        f"{server.metric('vllm:prefix_cache_hits_total'):.0f} cached tokens; PSS {before[1]:.0f} → "
        f"{after[1]:.0f} MiB, RSS {before[0]:.0f} → {after[0]:.0f} MiB; pages {left} of {total:.0f}; "
        f"{len(sample)} replayed, {differ} differ"
    )
    problems = []
    # Not by the proportional size: it grows when an unrelated program that shared a library ends.
    if after[0] > before[0] * MAX_GROWTH:
        problems.append("memory has grown")
    if sum(left.values()) != total:
        problems.append(f"pages were lost: {left} of {total:.0f}")
    if differ or not sample:
        problems.append("answers depend on company" if differ else "nothing was answered")
    if args.edge and not server.metric("vllm:num_preemptions_total"):
        problems.append("nothing was preempted: this was not the edge")
    figures = {
        "minutes": args.minutes, "pages": total, "answers": seen.num_ended, "left": seen.num_left,
        "refused": seen.num_refused, "preemptions": server.metric("vllm:num_preemptions_total"),
        "rss_mib": [round(before[0], 1), round(after[0], 1)],
        "pss_mib": [round(before[1], 1), round(after[1], 1)],
        "growth": round(after[0] / before[0] - 1, 4), "replayed": len(sample), "differ": differ,
        "failures": problems,
    }  # fmt: skip
    return problems, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--edge", action="store_true", help="pages for one sequence only; 30 minutes")
    parser.add_argument("--minutes", type=float, help="default: 10, or 30 with --edge")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--pages", type=int, help="default: 20, or 16 with --edge")
    parser.add_argument("--seed", type=int, default=20_261_123)
    parser.add_argument("--xllm-flags", type=shlex.split, default=[])
    args = parser.parse_args()
    args.minutes = args.minutes or (30.0 if args.edge else 10.0)
    args.pages = args.pages or (1024 // 64 if args.edge else 20)
    print(f"command: {shlex.join(['python', '-m', 'benchmarks.soak', *sys.argv[1:]])}")
    print("\n".join(f"{name}: {value}" for name, value in machine.describe().items()), flush=True)
    flags = ["--platform", "native", "--max-model-len", "1024", "--num-pages", str(args.pages)]
    flags += ["--max-num-seqs", "8", "--max-num-queued-reqs", "8", *args.xllm_flags]
    served = ["--served-model-name", args.model] if Path(args.model).exists() else []
    with serve(args.model, *flags, *served) as server:
        problems, figures = check(args, server, sum(pages(server).values()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))
    print("ok" if not problems else f"FAILED: {'; '.join(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
