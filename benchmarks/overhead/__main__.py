"""CPU time of the front and of the engine's threads for streams over HTTP, from the kernel's own accounts.

The engine's step is a sleep, so everything that is counted is overhead. Scheduler accounts do not see time
in which other processes had the core, but caches and clock rates are shared: take the best of the rounds.

    python -m benchmarks.overhead --streams 1 8 32 64
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.overhead.client import run_streams

READY = "ready: "


@contextlib.contextmanager
def server(step_ms: float, model: str | None, more: list[str]) -> Iterator[tuple[int, int, int]]:
    """(port, pid of the front, pid of the engine)."""
    command = [sys.executable, "-m", "benchmarks.overhead.server", str(step_ms), *more]
    if model is not None:
        command = [sys.executable, "-m", "xllm.cli.main", "serve", model, "--port", "0", *more]
        command += ["--served-model-name", "paced"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(line[len(READY) :].strip() for line in process.stderr if line.startswith(READY))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield int(url.rsplit(":", 1)[1]), process.pid, int(children[0])
    finally:
        process.terminate()
        process.wait(20)


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def one_round(port: int, front: int, engine: int, num_streams: int, args: argparse.Namespace) -> list[float]:
    before = cpu_ns(front), cpu_ns(engine), time.perf_counter()
    run_streams(port, num_streams, args.tokens, chat=args.chat)
    took_s = time.perf_counter() - before[2]
    tokens = num_streams * args.tokens
    front_us = (cpu_ns(front) - before[0]) / 1000
    engine_us = (cpu_ns(engine) - before[1]) / 1000
    return [front_us / tokens, engine_us / args.tokens, took_s / args.tokens * 1000, tokens / took_s]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", help="a real model instead of the sleeping engine")
    parser.add_argument("--serve-args", default="", help="more arguments of xllm serve, in one string")
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    args = parser.parse_args()
    print("streams  front us/token  engine us/step  ms/step  tokens/s   (best of rounds, each by itself)")
    with server(args.step_ms, args.model, args.serve_args.split()) as (port, front, engine):
        run_streams(port, max(args.streams), 32, chat=args.chat)
        for num in args.streams:
            rounds = [one_round(port, front, engine, num, args) for _ in range(args.rounds)]
            low = [min(column) for column in zip(*rounds, strict=True)]
            rate = max(r[3] for r in rounds)
            print(f"{num:7d}  {low[0]:14.1f}  {low[1]:14.0f}  {low[2]:7.2f}  {rate:8.0f}", flush=True)


if __name__ == "__main__":
    main()
