"""The step queue alone, in this process: what stands still between two native steps, with and without it.

    python -m benchmarks.native_queue --models smollm2 --out pipeline.json

The same plans of a decode are executed one by one, and handed over while one runs; both ways take turns. The
idle gap is from the end of one step's native work to the beginning of the next one's, as stamped there. No
scheduler: what that takes comes on top of the first way, and fits beside a step in the second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from benchmarks.compare import machine
from xllm.clock import SystemClock
from xllm.config import EngineConfig
from xllm.config.load import from_keywords
from xllm.engine.build import build_engine
from xllm.engine.plan import PENDING, SampleOp, SequencePlan, StepPlan, StepResult
from xllm.engine.runner.queued import QueuedRunner
from xllm.engine.time_slice import ask_long_slice, ask_usual_slice
from xllm.types import PAGE_SIZE, SamplingParams

BATCHES = (1, 8, 64)
CONTEXT_LEN = 128
NUM_STEPS = 48
ROOM = -(-(CONTEXT_LEN + NUM_STEPS + 1) // PAGE_SIZE)
GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


def sequence(seq_id: int, num_groups: int, start: int, tokens: Sequence[int], pending: bool) -> SequencePlan:
    used = -(-(start + len(tokens)) // PAGE_SIZE)
    pages = tuple(range(seq_id * ROOM, seq_id * ROOM + used))
    return SequencePlan(
        seq_id=seq_id,
        start=start,
        tokens=tuple(tokens),
        pages=(pages,) * num_groups,
        first_logit_row=len(tokens) - 1,
        sample=SampleOp(params=GREEDY, seed=0, choices=(0,), offset=start + len(tokens) - CONTEXT_LEN),
        pending=pending,
    )


def drawn(result: StepResult) -> list[int]:
    return [part.choices[0].tokens[0].token_id for part in result.sequences]


def prompts(runner: QueuedRunner, num: int) -> list[int]:
    """Fill the pages; the first token of each sequence."""
    groups = len(runner.kv_layout.groups)
    tokens: list[int] = []
    for first in range(0, num, 8):
        part = [
            sequence(i, groups, 0, [(7 * i + 13 * p) % 1000 for p in range(CONTEXT_LEN)], False)
            for i in range(first, min(first + 8, num))
        ]
        tokens += drawn(runner.execute(StepPlan(step=0, sequences=tuple(part))))
    return tokens


def executed(runner: QueuedRunner, plans: Sequence[StepPlan], tokens: list[int]) -> list[StepResult]:
    """One by one; what is pending is filled in before the clock of the next step begins."""
    found: list[StepResult] = []
    for plan in plans:
        known = [
            msgspec.structs.replace(s, tokens=(t,), pending=False)
            for s, t in zip(plan.sequences, tokens, strict=True)
        ]
        found.append(runner.execute(msgspec.structs.replace(plan, sequences=tuple(known))))
        tokens = drawn(found[-1])
    return found


def queued(runner: QueuedRunner, plans: Sequence[StepPlan]) -> list[StepResult]:
    """The next plan is always submitted before the step that runs is collected."""
    found: list[StepResult] = []
    runner.submit(plans[0])
    for plan in plans[1:]:
        runner.submit(plan)
        found.append(runner.collect())
    return [*found, runner.collect()]


def gaps_ms(results: Sequence[StepResult]) -> list[float]:
    return [
        1000 * (after.began_s - before.ended_s) for before, after in zip(results, results[1:], strict=False)
    ]


def steps_per_s(results: Sequence[StepResult]) -> float:
    return len(results) / (results[-1].ended_s - results[0].began_s)


def summary(runs: Sequence[Sequence[StepResult]]) -> dict[str, float]:
    gaps = sorted(gap for run in runs for gap in gaps_ms(run))
    return {
        "gap_p50_ms": median(gaps),
        "gap_p99_ms": quantiles(gaps, n=100)[98],
        "steps_per_s": median(steps_per_s(run) for run in runs),
    }


def measure(runner: QueuedRunner, num: int, repeats: int) -> dict[str, dict[str, float]]:
    groups = len(runner.kv_layout.groups)
    first = prompts(runner, num)
    plans = [
        StepPlan(
            step=k,
            sequences=tuple(
                sequence(i, groups, CONTEXT_LEN + k, (PENDING if k else first[i],), k > 0) for i in range(num)
            ),
        )
        for k in range(NUM_STEPS)
    ]
    ways: dict[str, list[list[StepResult]]] = {"executed": [], "queued": []}
    executed(runner, plans, first)
    for _ in range(repeats):
        ways["executed"].append(executed(runner, plans, first))
        ways["queued"].append(queued(runner, plans))
        if drawn(ways["queued"][-1][-1]) != drawn(ways["executed"][-1][-1]):
            raise SystemExit("the two ways drew different tokens")
    return {way: summary(runs) for way, runs in ways.items()}


def built(model: str, threads: int) -> QueuedRunner:
    keywords = {
        "model": model,
        "platform": "native",
        "num_threads": threads,
        "num_pages": max(BATCHES) * ROOM,
        "max_model_len": 1024,
        "max_num_seqs": max(BATCHES),
    }
    ask_long_slice()  # as an engine does for the threads that are made here
    runner = build_engine(from_keywords(EngineConfig, keywords), SystemClock(), lambda *_: None).runner
    ask_usual_slice()
    if not isinstance(runner, QueuedRunner):
        raise SystemExit(f"{model}: this runner takes no step while one runs")
    return runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--long-slice", action="store_true", help="for the thread that submits, too")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine.describe(), "threads": args.threads, "models": {}}
    for model in args.models:
        runner = built(model, args.threads)
        if args.long_slice:
            ask_long_slice()
        shapes = found["models"][model] = {}
        for num in args.batches:
            shapes[str(num)] = measure(runner, num, args.repeats)
            for way, row in shapes[str(num)].items():
                told = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
                print(f"{model} {num:>3} {way:<9} {told}", flush=True)
        runner.close()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
