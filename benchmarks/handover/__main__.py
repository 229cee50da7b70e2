"""What a hand-over costs: hidden share, added time to the first token and to the second, gap of a live move.

Two engines of one thread each behind a front in this process. Requests are served by one engine alone and,
in turn with that, handed over after their first token; then running ones are moved while they decode.

    python -m benchmarks.handover --transfers shm,tcp,mooncake
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare import machine
from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig
from xllm.config.load import from_keywords
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceAbout
from xllm.service.instances.local import LocalEngine
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.snapshot import NullObserver
from xllm.types import SamplingParams

FIRST, SECOND = "engine-0", "engine-1"


@dataclass(slots=True)
class Route:
    """The router's policy: everything to the first engine; `hands_over` = and on to the second."""

    hands_over: bool = False

    def __call__(
        self, request: RequestView, snapshot: RouterSnapshot, config: FrontConfig
    ) -> Placement | None:
        return Placement(instance=FIRST, reasons=("as asked",), decode=SECOND if self.hands_over else None)


@dataclass(slots=True)
class Records(NullObserver):
    records: list[HandoverRecord] = field(default_factory=list)

    def on_handover(self, record: HandoverRecord) -> None:
        self.records.append(record)


@dataclass(frozen=True, slots=True)
class Run:
    """Times of one request's tokens, from its submission."""

    token_s: list[float]

    @property
    def ttft_ms(self) -> float:
        return self.token_s[0] * 1000

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1000 for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Bench:
    """The front, its engines, and what it was told of hand-overs."""

    def __init__(self, front: Front, route: Route, seen: Records, model: str) -> None:
        self.front = front
        self.route = route
        self.records = seen.records
        self._model = model
        self._random = random.Random(7)

    async def run(
        self, prompt_len: int, num_tokens: int, at: int = -1, do: Callable[[str], None] | None = None
    ) -> Run:
        """One request; `do(request id)` is called when its token number `at` has come."""
        prompt = tuple(self._random.randrange(1000, 20000) for _ in range(prompt_len))
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=1, ignore_eos=True)
        draft = RequestDraft(model=self._model, prompt_token_ids=prompt, params=params)
        began_s = time.perf_counter()
        live = await self.front.submit(draft)
        token_s: list[float] = []
        async for delta in live:
            now_s = time.perf_counter() - began_s
            token_s += [now_s] * len(delta.token_ids)
            if do is not None and len(token_s) == at:
                do(live.request_id)
        return Run(token_s)


async def open_bench(
    model: str, transfer: str, mode: str, max_model_len: int
) -> tuple[Bench, list[LocalEngine]]:
    route, seen = Route(), Records()
    front_config = from_keywords(FrontConfig, {"transfer_mode": mode, "max_queue_delay_s": 0.0})
    front = Front(front_config, route, SystemClock(), observer=seen)
    config = from_keywords(
        EngineConfig,
        {
            "model": model,
            "transfer": transfer,
            "max_model_len": max_model_len,
            "num_pages": 2 * -(-max_model_len // 64) + 8,
            "num_local_instances": 2,
            "enable_prefix_caching": False,
        },
    )
    engines = []
    for name in (FIRST, SECOND):
        engine = await LocalEngine.launch(config)
        about = InstanceAbout(pid=engine.pid, endpoints=engine.endpoints)
        await front.add_instance(engine.stream, engine.card, name=name, max_reqs=engine.max_reqs, about=about)
        engines.append(engine)
    return Bench(front, route, seen, engines[0].card.model_id), engines


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
        bench.records.clear()
        other = await bench.run(prompt_len, 24)
        record = done(bench.records)
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


async def measure_live(bench: Bench, rounds: int, context_len: int) -> dict[str, Any]:
    """A running request is moved after 24 of its 64 tokens: its longest gap from there on, in steps."""
    worst_steps: list[float] = []
    worst_ms: list[float] = []
    usual_steps: list[float] = []
    for number in range(rounds + 1):
        bench.records.clear()
        move: Callable[[str], None] = lambda rid: must(bench.front.move(rid, SECOND))  # noqa: E731
        run = await bench.run(context_len, 64, 24, move)
        done(bench.records)
        step_ms = statistics.median(run.gaps_ms[:24])
        if number:
            worst_ms.append(max(run.gaps_ms[24:]))
            worst_steps.append(worst_ms[-1] / step_ms)
            usual_steps.append(max(run.gaps_ms[4:24]) / step_ms)
    return {
        "context_len": context_len,
        "longest_gap_ms": median(worst_ms),
        "longest_gap_steps": median(worst_steps),
        "longest_gap_steps_each": [round(s, 2) for s in worst_steps],
        "longest_gap_steps_before": median(usual_steps),
    }


def must(why: str) -> None:
    if why:
        raise SystemExit(f"the request could not be moved: {why}")


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


async def one_way(args: argparse.Namespace, transfer: str, mode: str) -> dict[str, Any]:
    bench, engines = await open_bench(args.model, transfer, mode, args.max_model_len)
    try:
        result: dict[str, Any] = {"transfer": transfer, "mode": mode}
        result["prefill"] = await measure_prefill(bench, args.rounds, args.prompt_len)
        result["live"] = [await measure_live(bench, args.rounds, n) for n in args.contexts]
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8000])
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    text = json.dumps(asyncio.run(run(args)), indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
