"""Router policies compared on real servers: multi-turn chats under shared system prompts, over HTTP.

    python -m benchmarks.routing_live [--model smollm2] [--instances 3] [--rounds 2] [--json FILE]

Every measurement starts a server of its own (`xllm serve --instances mixed:N --router-policy P`), so caches
start cold; the policies take turns within a round, and the next round takes them in another order.
All get the same conversations. "one" is a single instance: what it hits is the ideal for this load,
since there is one cache and everything is in it; its times are not comparable.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xllm.cli.bench.datasets import WORDS
from xllm.cli.http_client import Exchange, Server, events
from xllm.testing.server_process import ServerProcess, serve

COUNTERS = ("xllm:engine_requests_accepted", "vllm:generation_tokens", "vllm:prompt_tokens")
POLICIES = ("round-robin", "least-load", "cache-aware", "slo-aware")
IDEAL = "one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_conversations: int
    num_systems: int
    system_words: int
    turns: int
    output_len: int
    rate: float
    think_s: float
    seed: int


@dataclass(slots=True)
class Seen:
    """What the client saw. Times in milliseconds."""

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_cached: int = 0
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)


def words(rng: random.Random, num: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num))


async def ask(server: Server, model: str, messages: list[dict[str, str]], load: Load, seen: Seen) -> str:
    """One turn; its text, empty if it failed."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": load.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    seen.num_requests += 1
    start = time.perf_counter()
    first = last = 0.0
    parts: list[str] = []
    async with Exchange(server, "POST", "/v1/chat/completions", body) as response:
        if response.status != 200:
            seen.errors.append(f"{response.status} {(await response.read())[:200]!r}")
            return ""
        async for data in events(response.body):
            if data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                seen.errors.append(str(event["error"])[:200])
                return ""
            if usage := event.get("usage"):
                seen.num_prompt += usage["prompt_tokens"]
                seen.num_cached += usage["prompt_tokens_details"]["cached_tokens"]
            for choice in event.get("choices", ()):
                if text := choice["delta"].get("content"):
                    last = time.perf_counter()
                    first = first or last
                    parts.append(text)
    if first:
        seen.ttft_ms.append((first - start) * 1000)
        if len(parts) > 1:
            seen.tpot_ms.append((last - first) * 1000 / (len(parts) - 1))
    return "".join(parts)


async def converse(server: Server, model: str, load: Load, number: int, system: str, seen: Seen) -> None:
    rng = random.Random(f"{load.seed}/{number}")
    messages = [{"role": "system", "content": system}]
    for _ in range(rng.randint(2, load.turns)):
        messages.append({"role": "user", "content": words(rng, rng.randint(10, 60))})
        answer = await ask(server, model, messages, load, seen)
        messages.append({"role": "assistant", "content": answer})
        await asyncio.sleep(rng.expovariate(1 / load.think_s))


async def run_load(server: Server, model: str, load: Load) -> Seen:
    rng, seen = random.Random(load.seed), Seen()
    systems = [
        words(rng, rng.randint(load.system_words // 2, load.system_words)) for _ in range(load.num_systems)
    ]
    popularity = [1 / (i + 1) for i in range(load.num_systems)]
    async with asyncio.TaskGroup() as group:
        for number in range(load.num_conversations):
            system = rng.choices(systems, popularity)[0]
            group.create_task(converse(server, model, load, number, system, seen))
            await asyncio.sleep(rng.expovariate(load.rate))
    return seen


def per_engine(server: ServerProcess, name: str) -> list[float]:
    """One counter of /metrics, engine by engine."""
    return [v for k, v in server.metrics().items() if k.startswith((name + "{", name + "_total{"))]


def wait_for_all(server: ServerProcess, num: int, timeout_s: float = 120.0) -> None:
    """A server is ready with its first instance; a comparison starts with all of them."""
    end = time.perf_counter() + timeout_s
    while (up := sum(per_engine(server, "xllm:instance_up"))) < num:
        if time.perf_counter() > end:
            raise SystemExit(f"only {up:.0f} of {num} instances are up after {timeout_s:.0f} s")
        time.sleep(0.2)


def spread(values: Sequence[float]) -> float:
    return max(values) / statistics.mean(values) if values and sum(values) else float("nan")


def measure(
    model: str, policy: str, num_instances: int, load: Load, extra: Sequence[str]
) -> dict[str, object]:
    args = [model, "--log-level", "warning", *extra]
    if policy != IDEAL:
        args += ["--instances", f"mixed:{num_instances}", "--router-policy", policy]
    with serve(*args) as server:
        wait_for_all(server, 1 if policy == IDEAL else num_instances)
        before = [per_engine(server, name) for name in COUNTERS]
        started = time.perf_counter()
        seen = asyncio.run(run_load(Server.parse(server.base_url), model, load))
        wall_s = time.perf_counter() - started
        after = [per_engine(server, name) for name in COUNTERS]
    accepted, drawn, computed = (
        [late - early for late, early in zip(*both, strict=True)] for both in zip(after, before, strict=True)
    )
    work = [p + d for p, d in zip(computed, drawn, strict=True)]
    if not seen.ttft_ms:
        raise SystemExit(f"{policy}: no request was answered: {seen.errors[:3]}")
    ordered = sorted(seen.ttft_ms)
    return {
        "policy": policy,
        "num_requests": seen.num_requests,
        "num_errors": len(seen.errors),
        "errors": seen.errors[:3],
        "wall_s": round(wall_s, 2),
        "hit_rate": seen.num_cached / max(1, seen.num_prompt),
        "prompt_tokens": seen.num_prompt,
        "ttft_p50_ms": statistics.median(ordered),
        "ttft_p90_ms": ordered[int(0.9 * len(ordered))],
        "tpot_p50_ms": statistics.median(seen.tpot_ms) if seen.tpot_ms else None,
        "load_requests": spread(accepted),
        "load_tokens": spread(work),
        "requests_per_engine": accepted,
        "tokens_per_engine": work,
    }


def show(rows: list[dict[str, object]]) -> None:
    ideal = [float(r["hit_rate"]) for r in rows if r["policy"] == IDEAL]  # type: ignore[arg-type]
    head = (
        "policy",
        "reqs",
        "errors",
        "hit",
        "ideal",
        "ttft p50",
        "p90",
        "tpot p50",
        "reqs max/mean",
        "tokens",
    )
    print("  ".join(f"{h:>13}" for h in head))
    for policy in dict.fromkeys(str(r["policy"]) for r in rows):
        mine = [r for r in rows if r["policy"] == policy]

        def mean(key: str, mine: list[dict[str, object]] = mine) -> float:
            return statistics.mean(float(r[key]) for r in mine if r[key] is not None)  # type: ignore[arg-type]

        share = f"{mean('hit_rate') / ideal[0]:.3f}" if ideal and ideal[0] else "-"
        cells = [
            policy,
            f"{mean('num_requests'):.0f}",
            f"{mean('num_errors'):.0f}",
            f"{mean('hit_rate'):.3f}",
            share,
        ]
        cells += [f"{mean(k):.1f}" for k in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms")]
        cells += [f"{mean(k):.2f}" for k in ("load_requests", "load_tokens")]
        print("  ".join(f"{c:>13}" for c in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--policies", nargs="+", default=[IDEAL, *POLICIES])
    parser.add_argument("--conversations", type=int, default=36)
    parser.add_argument("--systems", type=int, default=6)
    parser.add_argument("--system-words", type=int, default=600)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.0, help="new conversations a second")
    parser.add_argument("--think-s", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("extra", nargs="*", help="after --: arguments of xllm serve, e.g. -- --platform null")
    args = parser.parse_args()
    load = Load(
        num_conversations=args.conversations,
        num_systems=args.systems,
        system_words=args.system_words,
        turns=args.turns,
        output_len=args.output_len,
        rate=args.rate,
        think_s=args.think_s,
        seed=args.seed,
    )
    rows: list[dict[str, object]] = []
    for number in range(args.rounds):
        turn = number % len(args.policies)
        for policy in args.policies[turn:] + args.policies[:turn]:
            if policy == IDEAL and any(r["policy"] == IDEAL for r in rows):
                continue
            row = measure(args.model, policy, args.instances, load, args.extra)
            rows.append({"round": number, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    if args.json:
        found = {"command": sys.argv[1:], "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
