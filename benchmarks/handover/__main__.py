"""What a hand-over costs: hidden share, added time to the first token and to the second, gap of a live move.

Two engines of one thread each behind a front in this process. Requests are served by one engine alone and,
in turn with that, handed over after their first token; then one is moved to and fro while it decodes.

    python -m benchmarks.handover --transfers shm,tcp,mooncake
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import machine
from benchmarks.handover.bench import Bench, Run, median, open_bench
from benchmarks.handover.live import measure_live
from xllm.service.handover.record import HandoverRecord


def done(records: Sequence[HandoverRecord]) -> HandoverRecord:
    """The one hand-over that was made. Anything else would measure something else."""
    if len(records) != 1 or records[0].outcome != "done":
        raise SystemExit(f"a hand-over did not come about: {records}")
    return records[0]


async def measure_prefill(bench: Bench, rounds: int, prompt_len: int) -> dict[str, Any]:
    """In turn: kept by one engine, handed over after the prompt."""
    alone: list[Run] = []
    moved: list[Run] = []
    records: list[HandoverRecord] = []
    for number in range(rounds + 1):
        bench.route.hands_over = False
        one = await bench.run(prompt_len, 24)
        bench.route.hands_over = True
        bench.seen.records.clear()
        other = await bench.run(prompt_len, 24)
        record = done(bench.seen.records)
        if number:  # the first round warms up
            alone.append(one)
            moved.append(other)
            records.append(record)
    bench.route.hands_over = False
    return {
        "prompt_len": prompt_len,
        "mib": round(records[0].num_bytes / 2**20, 1),
        "transfer_ms": median(r.transfer_ms for r in records),
        "exposed_ms": median(r.exposed_ms for r in records),
        "hidden_share": median(r.hidden_share or 0.0 for r in records),
        "ttft_ms_alone": median(r.ttft_ms for r in alone),
        "ttft_ms_handed_over": median(r.ttft_ms for r in moved),
        "first_gap_ms_alone": median(r.gaps_ms[0] for r in alone),
        "first_gap_ms_handed_over": median(r.gaps_ms[0] for r in moved),
        "step_ms": median(statistics.median(r.gaps_ms) for r in alone),
    }


async def one_way(args: argparse.Namespace, transfer: str, mode: str) -> dict[str, Any]:
    bench, engines = await open_bench(args.model, transfer, mode, args.max_model_len, args.quantize)
    try:
        result: dict[str, Any] = {"transfer": transfer, "mode": mode}
        if args.prompt_len:
            result["prefill"] = await measure_prefill(bench, args.rounds, args.prompt_len)
        result["live"] = [
            await measure_live(bench, args.moves, n, beside)
            for n in args.contexts
            for beside in (False, True)
        ]
        return result
    finally:
        await bench.front.close()
        for engine in engines:
            await engine.terminate()


async def run(args: argparse.Namespace) -> dict[str, Any]:
    ways = [(t, m) for t in args.transfers.split(",") for m in args.modes.split(",")]
    results = [await one_way(args, transfer, mode) for transfer, mode in ways]
    command = shlex.join(["benchmarks.handover", *sys.argv[1:]])
    return {"machine": machine.describe(), "command": command, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--transfers", default="shm,tcp,mooncake")
    parser.add_argument("--modes", default="push")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-len", type=int, default=1024, help="0 = no prompts, live moves only")
    parser.add_argument("--moves", type=int, default=10, help="of one running request")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 7400])
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    text = json.dumps(asyncio.run(run(args)), indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
