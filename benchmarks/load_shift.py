"""Load that turns from prompts to answers and back: roles that follow it against roles that do not.

One server of real processes for each way of using N instances, one after the other, under the same arrivals
(open loop, Poisson, the same seed). Steps take the time of a cost formula and no CPU (`benchmarks/outside`):
N instances are as fast on two cores as on N machines. A request is good when its first token and its
pace kept to the objectives.

    python -m benchmarks.load_shift --seconds 40
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.compare import machine
from xllm.testing.server_process import serve

OUTSIDE = Path(__file__).parent / "outside"


@dataclass(frozen=True, slots=True)
class Kind:
    """What arrives in one phase: mean lengths in tokens, and how many requests a second."""

    name: str
    prompt_len: int
    output_len: int
    per_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    phase: int
    prompt: tuple[int, ...]
    output_len: int


@dataclass(slots=True)
class Answer:
    phase: int
    status: str = "lost"
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    num_tokens: int = 0


def arrivals(phases: list[Kind], phase_s: float, seed: int) -> list[Arrival]:
    """Lengths vary by half around their mean."""
    rng = random.Random(seed)
    out: list[Arrival] = []
    for number, kind in enumerate(phases):
        at_s = number * phase_s
        while (at_s := at_s + rng.expovariate(kind.per_s)) < (number + 1) * phase_s:
            length = round(kind.prompt_len * rng.uniform(0.5, 1.5))
            prompt = tuple(rng.randrange(1000, 20000) for _ in range(length))
            out.append(Arrival(at_s, number, prompt, max(2, round(kind.output_len * rng.uniform(0.5, 1.5)))))
    return out


async def ask(port: int, arrival: Arrival, start_s: float) -> Answer:
    """One streamed completion; times from when it was due, so that a late client is no excuse."""
    await asyncio.sleep(max(0.0, start_s + arrival.at_s - time.monotonic()))
    answer = Answer(arrival.phase)
    due_s = start_s + arrival.at_s
    body = json.dumps(
        {
            "model": "paced",
            "prompt": arrival.prompt,
            "max_tokens": arrival.output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        status = (await reader.readline()).split()[1].decode()
        first_s = last_s = 0.0
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                answer.status = "done"
            elif line.startswith(b"data: ") and b'"error"' not in line[:20]:
                last_s = time.monotonic()
                first_s = first_s or last_s
                answer.num_tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
        if status != "200":
            answer.status = status
        elif answer.status == "done":
            answer.ttft_ms = (first_s - due_s) * 1000
            answer.tpot_ms = (last_s - first_s) * 1000 / max(1, answer.num_tokens - 1)
            if answer.num_tokens != arrival.output_len:
                answer.status = "incomplete"
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    return answer


def wait_for_all(base_url: str, num: int) -> None:
    """The server takes requests from its first complete group on; ways are compared with all instances."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        instances = httpx.get(f"{base_url}/instances", timeout=10).json()["instances"]
        if sum(i["state"] == "ready" for i in instances) == num:
            return
        time.sleep(0.1)
    raise SystemExit(f"{num} instances were not ready within a minute")


async def drive(port: int, load: list[Arrival]) -> list[Answer]:
    start_s = time.monotonic() + 0.5
    return await asyncio.gather(*(ask(port, a, start_s) for a in load))


def summary(
    answers: list[Answer], phases: list[Kind], slo: tuple[float, float], seconds: float
) -> dict[str, Any]:
    def good(a: Answer) -> bool:
        return a.status == "done" and a.ttft_ms <= slo[0] and a.tpot_ms <= slo[1]

    def of(some: list[Answer]) -> dict[str, Any]:
        done = [a for a in some if a.status == "done"]
        return {
            "requests": len(some),
            "good": round(sum(map(good, some)) / len(some), 4),
            "ttft_ok": round(sum(a.status == "done" and a.ttft_ms <= slo[0] for a in some) / len(some), 4),
            "tpot_ok": round(sum(a.status == "done" and a.tpot_ms <= slo[1] for a in some) / len(some), 4),
            "ttft_ms_p50": round(statistics.median(a.ttft_ms for a in done), 1) if done else None,
            "tpot_ms_p50": round(statistics.median(a.tpot_ms for a in done), 2) if done else None,
        }

    statuses = {s: sum(a.status == s for a in answers) for s in sorted({a.status for a in answers})}
    return {
        "all": of(answers),
        "phases": {f"{n} {k.name}": of([a for a in answers if a.phase == n]) for n, k in enumerate(phases)},
        "statuses": statuses,
        "good_tokens_per_s": round(sum(a.num_tokens for a in answers if good(a)) / seconds, 1),
    }


def ways(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """(name, --instances, role control, rows of a step)."""
    n = args.instances
    yield "adaptive", f"prefill:{n // 2},decode:{n - n // 2}", "adaptive", 512
    for prefill in range(1, n):
        yield f"static {prefill}P+{n - prefill}D", f"prefill:{prefill},decode:{n - prefill}", "static", 512
    for rows in args.chunks:
        yield f"mixed, chunks of {rows}", f"mixed:{n}", "static", rows


def run_one(args: argparse.Namespace, way: tuple[str, str, str, int], load: list[Arrival]) -> dict[str, Any]:
    name, instances, control, rows = way
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(OUTSIDE), os.environ.get("PYTHONPATH", "")]),
        "PACED_MS": args.paced_ms,
        "XLLM_ROLE_CONTROL": control,
        "XLLM_SLO_TTFT_MS": str(args.slo_ttft_ms),
        "XLLM_SLO_TPOT_MS": str(args.slo_tpot_ms),
        "XLLM_MAX_QUEUE_DELAY_S": "0",
    }
    flags = [
        "--platform=paced",
        "--served-model-name=paced",
        f"--instances={instances}",
        "--log-level=warning",
    ]
    flags += [f"--max-num-batched-tokens={rows}", f"--router-policy={args.policy}", "--num-pages=2048"]
    flags += ["--no-enable-prefix-caching", "--max-model-len=4096"]
    with serve(args.model, *flags, env=env) as server:
        wait_for_all(server.base_url, args.instances)
        answers = asyncio.run(drive(server.port, load))
        metrics = server.metrics()
    switches = {k: v for k, v in metrics.items() if k.startswith("xllm:role_switches")}
    result = summary(
        answers, args.phases, (args.slo_ttft_ms, args.slo_tpot_ms), args.seconds * len(args.phases)
    )
    result["switches"] = sum(v for k, v in switches.items() if not k.startswith("xllm:role_switches_created"))
    result["switches_by_kind"] = switches
    print(
        f"{name}: {json.dumps(result['all'])} {result['statuses']} switches {result['switches']}", flush=True
    )
    return {"way": name, "instances": instances, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="its shapes and vocabulary; no weights are used")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each of the three phases")
    parser.add_argument("--paced-ms", default="8,0.25,0,0.5,0.0005")
    parser.add_argument("--slo-ttft-ms", type=float, default=1500.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=30.0)
    parser.add_argument("--policy", default="slo-aware")
    parser.add_argument(
        "--prompts", default="1500,16,5.5", help="prompt, output, requests/s of the first phase"
    )
    parser.add_argument("--answers", default="120,240,10", help="the same of the second phase")
    parser.add_argument("--chunks", type=int, nargs="*", default=[512, 64])
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    first, second = (args.prompts.split(","), args.answers.split(","))
    prompts = Kind("prompts", int(first[0]), int(first[1]), float(first[2]))
    answers = Kind("answers", int(second[0]), int(second[1]), float(second[2]))
    args.phases = [prompts, answers, prompts]
    load = arrivals(args.phases, args.seconds, args.seed)
    results = [run_one(args, way, load) for way in ways(args) if args.only in way[0]]
    command = shlex.join(["benchmarks.load_shift", *sys.argv[1:]])
    if args.output:
        found = {"machine": machine.describe(), "command": command, "results": results}
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
