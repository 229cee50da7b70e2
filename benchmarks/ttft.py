"""Time to first token of a freshly started local server: start-up, first request, then warm requests.

make bench-ttft                        (settings from the environment, e.g. XLLM_PLATFORM=cpu)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xllm.cli.background import background_server
from xllm.cli.bench.datasets import Ask, random_prompts
from xllm.cli.bench.generator import Target, run_load
from xllm.cli.bench.metrics import summarise
from xllm.cli.bench.online import first_model
from xllm.cli.http_client import Server
from xllm.cli.serving import SECTIONS
from xllm.clock import SystemClock
from xllm.config.env import variables
from xllm.config.load import load

INPUT_LENS = (8, 64, 256)


def measure(target: Target, asks: list[Ask]) -> dict[str, Any]:
    """One request after the other: nothing here waits in a queue."""
    times = [0.0] * len(asks)
    return summarise(asyncio.run(run_load(target, asks, times, SystemClock(), max_concurrency=1)), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = load(
        *SECTIONS, env=variables(), keywords={"model": args.model, "port": 0, "log_level": "warning"}
    )
    rows: list[dict[str, Any]] = []
    with background_server(loaded, lambda line: print(line, file=sys.stderr)) as url:
        startup_s = process_age_s()
        server = Server.parse(url)
        target = Target(server=server, model=asyncio.run(first_model(server, "")))
        cold = measure(target, [Ask(prompt="Hello", output_len=1)])
        first_s = startup_s + cold["mean_ttft_ms"] / 1000
        print(
            f"process start to an open port {startup_s:.2f} s, to the first token {first_s:.2f} s "
            f"(the first request's TTFT {cold['mean_ttft_ms']:.1f} ms)"
        )
        print(f"{'prompt tokens':>14} {'TTFT median':>12} {'TTFT max':>10} {'TPOT median':>12}   (ms)")
        for length in INPUT_LENS:
            asks = random_prompts(args.repeats, length, args.output_len, np.random.default_rng(length))
            found = measure(target, asks)
            tokens = found["total_input_tokens"] / max(1, found["completed"])
            print(
                f"{tokens:>14.0f} {found['median_ttft_ms']:>12.1f} {found['p99_ttft_ms']:>10.1f} "
                f"{found['median_tpot_ms']:>12.1f}"
            )
            rows.append({"input_words": length} | found)
    if args.json is not None:
        result = {"commit": commit(), "machine": platform.platform(), "model": args.model, "rows": rows}
        result |= {"startup_s": startup_s, "cold_ttft_ms": cold["mean_ttft_ms"], "seeds": list(INPUT_LENS)}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def process_age_s() -> float:
    """Seconds since this process began, interpreter and imports included; in steps of 10 ms."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
