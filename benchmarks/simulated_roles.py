"""Policies for roles compared under load that shifts between prompts and decoding, in virtual time.

    python -m benchmarks.simulated_roles [--machine cpu gpu] [--instances 4] [--seeds 3] [--json FILE]

Front, router, control of roles, hand-over, scheduler and page memory are the code that serves; only the time
of a step, the wires and the clients are made up (`xllm.simulation`). Every policy gets the same requests:
prefill-heavy, then decode-heavy, then prefill-heavy again. Nothing is timed here; the results depend on the
seeds only.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from xllm.config import FrontConfig, SchedulerConfig
from xllm.cost import StepCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.snapshot import NullObserver
from xllm.simulation.cluster import EngineShape, SimCluster
from xllm.simulation.load import LoadPhase, Served, draw_load, serve_load
from xllm.simulation.loop import run_virtual
from xllm.simulation.network import Wire
from xllm.types import SLO, Phase

MAX_MODEL_LEN = 4096
SETTLE_S = 1.0
ROLES: dict[str, tuple[Phase, ...]] = {
    "P": ("prefill",),
    "D": ("decode",),
    "M": ("prefill", "decode"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What instances are like, what is promised, and load that a few of them can just carry.

    Rates are per instance and second.
    """

    step: StepCost
    slo: SLO
    page_bytes: int
    chunk: int
    small_chunk: int
    max_num_seqs: int
    phases: tuple[LoadPhase, ...]
    bytes_per_s: float


CPU = Machine(
    # About SmolLM2-135M on two cores (benchmarks/routing.py).
    step=StepCost((2.0, 0.1, 0.00005, 0.3, 0.0002)),
    slo=SLO(ttft_ms=1000.0, tpot_ms=30.0),
    page_bytes=1_474_560,
    chunk=512,
    small_chunk=128,
    max_num_seqs=64,
    phases=(
        LoadPhase(name="prompts", lasts_s=20.0, rate=4.0, prompt_len=1000, output_len=32),
        LoadPhase(name="decoding", lasts_s=20.0, rate=8.0, prompt_len=120, output_len=160),
        LoadPhase(name="prompts again", lasts_s=20.0, rate=4.0, prompt_len=1000, output_len=32),
    ),
    bytes_per_s=3e9,
)
GPU = Machine(
    # A step reads all weights whatever it computes: 10 ms; a prompt row takes 0.05 ms.
    step=StepCost((10.0, 0.05, 0.000005, 0.05, 0.00001)),
    slo=SLO(ttft_ms=1000.0, tpot_ms=16.0),
    page_bytes=8_388_608,
    chunk=1024,
    small_chunk=96,
    max_num_seqs=128,
    phases=(
        LoadPhase(name="prompts", lasts_s=20.0, rate=5.5, prompt_len=1400, output_len=32),
        LoadPhase(name="decoding", lasts_s=20.0, rate=13.0, prompt_len=100, output_len=250),
        LoadPhase(name="prompts again", lasts_s=20.0, rate=5.5, prompt_len=1400, output_len=32),
    ),
    bytes_per_s=20e9,
)
PACED = Machine(
    # What the processes of benchmarks/load_shift.py take by default.
    step=StepCost((8.0, 0.25, 0.0, 0.5, 0.0005)),
    slo=SLO(ttft_ms=1500.0, tpot_ms=30.0),
    page_bytes=1_474_560,
    chunk=512,
    small_chunk=64,
    max_num_seqs=64,
    phases=(
        LoadPhase(name="prompts", lasts_s=20.0, rate=1.375, prompt_len=1500, output_len=16, spread=0.3),
        LoadPhase(name="decoding", lasts_s=20.0, rate=2.5, prompt_len=120, output_len=240, spread=0.3),
        LoadPhase(name="prompts again", lasts_s=20.0, rate=1.375, prompt_len=1500, output_len=16, spread=0.3),
    ),
    bytes_per_s=3e9,
)
MACHINES = {"cpu": CPU, "gpu": GPU, "paced": PACED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a load differs from its machine's own: factors."""

    rate: float = 1.0
    prompt_len: float = 1.0
    output_len: float = 1.0


LOADS = {
    "usual": Shape(),
    "mild": Shape(rate=0.7),
    "hard": Shape(rate=1.2),
    "short prompts": Shape(rate=1.4, prompt_len=0.4),
    "long answers": Shape(rate=0.8, prompt_len=0.8, output_len=2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`roles` = one letter an instance: P, D or M."""

    name: str
    roles: str
    router: str = "slo-aware"
    adaptive: bool = False
    small_chunks: bool = False
    has_budget: bool = True


def policies(num_instances: int) -> list[Policy]:
    half = num_instances // 2
    splits = sorted({1, half, num_instances - 1})
    found = [
        Policy(name="mixed, slo-aware", roles="M" * num_instances),
        Policy(name="mixed, slo-aware, no budget", roles="M" * num_instances, has_budget=False),
        Policy(name="mixed, slo-aware, small chunks", roles="M" * num_instances, small_chunks=True),
        Policy(name="mixed, round-robin", roles="M" * num_instances, router="round-robin"),
        Policy(name="mixed, least-load", roles="M" * num_instances, router="least-load"),
        Policy(
            name="mixed, least-load, no budget",
            roles="M" * num_instances,
            router="least-load",
            has_budget=False,
        ),
        Policy(
            name="mixed, least-load, small chunks",
            roles="M" * num_instances,
            router="least-load",
            small_chunks=True,
        ),
    ]
    for p in splits:
        roles = "P" * p + "D" * (num_instances - p)
        found.append(Policy(name=f"static {p}P+{num_instances - p}D, slo-aware", roles=roles))
    roles = "P" * half + "D" * (num_instances - half)
    found += [
        Policy(name=f"static {half}P+{half}D, round-robin", roles=roles, router="round-robin"),
        Policy(name=f"static {half}P+{half}D, least-load", roles=roles, router="least-load"),
        Policy(name=f"adaptive from {half}P+{half}D", roles=roles, adaptive=True),
        Policy(name="adaptive from mixed", roles="M" * num_instances, adaptive=True),
        Policy(
            name=f"adaptive from {half}P+{half}D, least-load", roles=roles, router="least-load", adaptive=True
        ),
        Policy(
            name="adaptive from mixed, least-load",
            roles="M" * num_instances,
            router="least-load",
            adaptive=True,
        ),
    ]
    return found


class Watch(NullObserver):
    """Counts what only the front can tell."""

    def __init__(self) -> None:
        self.flips: list[str] = []
        self.num_handovers = 0

    def on_role(self, name: str, source: str, target: str, reason: str, numbers: str) -> None:
        now_s = asyncio.get_running_loop().time() - 1001.0
        self.flips.append(f"{now_s:6.1f} s {name}: {source} to {target} ({reason}) {numbers}")

    def on_handover(self, record: HandoverRecord) -> None:
        self.num_handovers += record.outcome == "done"


@dataclass(slots=True)
class Outcome:
    """`kept` by phase is the share of its requests that got both promises."""

    kept: dict[str, float] = field(default_factory=dict)
    kept_all: float = 0.0
    kept_ttft: float = 0.0
    kept_tpot: float = 0.0
    goodput: float = 0.0
    num_lost: int = 0
    flips_per_min: float = 0.0
    num_handovers: int = 0
    ttft_p90_ms: float = 0.0
    tpot_p90_ms: float = 0.0
    second_p50_ms: float = 0.0
    second_p90_ms: float = 0.0
    took_s: float = 0.0
    flips: list[str] = field(default_factory=list)


COLUMNS = {
    "kept": ("kept_all", 3),
    "ttft": ("kept_ttft", 3),
    "tpot": ("kept_tpot", 3),
    "goodput": ("goodput", 2),
    "p90 ttft": ("ttft_p90_ms", 0),
    "p90 tpot": ("tpot_p90_ms", 1),
    "2nd p50": ("second_p50_ms", 0),
    "2nd p90": ("second_p90_ms", 0),
    "lost": ("num_lost", 1),
    "flips": ("flips_per_min", 1),
    "moves": ("num_handovers", 0),
    "run s": ("took_s", 1),
}
"""What is printed: field of Outcome and digits behind the point."""


def run_policy(
    machine: Machine, policy: Policy, seed: int, scale: float = 1.0, shape: Shape = LOADS["usual"]
) -> Outcome:
    begun_s = time.perf_counter()
    outcome = run_virtual(_run(machine, policy, seed, scale, shape))
    outcome.took_s = time.perf_counter() - begun_s
    return outcome


async def _run(machine: Machine, policy: Policy, seed: int, scale: float, load: Shape) -> Outcome:
    num = len(policy.roles)
    phases = [
        LoadPhase(
            name=p.name,
            lasts_s=p.lasts_s * scale,
            rate=p.rate * num * load.rate,
            prompt_len=round(p.prompt_len * load.prompt_len),
            output_len=round(p.output_len * load.output_len),
            spread=p.spread,
        )
        for p in machine.phases
    ]
    requests = draw_load(phases, random.Random(seed), max_prompt_len=3000, max_output_len=800)
    config = FrontConfig(
        router_policy=policy.router,
        role_control="adaptive" if policy.adaptive else "static",
        slo_ttft_ms=machine.slo.ttft_ms or 1000.0,
        slo_tpot_ms=machine.slo.tpot_ms or 100.0,
        max_queue_delay_s=0.0,
        max_kv_oversubscription=1000.0,
    )
    shape = EngineShape(
        num_pages=4096,
        scheduler=SchedulerConfig(
            max_num_seqs=machine.max_num_seqs,
            max_num_batched_tokens=machine.small_chunk if policy.small_chunks else machine.chunk,
            max_num_queued_reqs=4096,
            enable_step_time_budget=policy.has_budget,
        ),
        step_time=machine.step,
        max_model_len=MAX_MODEL_LEN,
        page_bytes=machine.page_bytes,
        exact=False,
    )
    watch = Watch()
    wire = Wire(latency_s=0.0002, bytes_per_s=machine.bytes_per_s)
    cluster = SimCluster(config, shape, rng=random.Random(seed), observer=watch, wire=wire)
    for i, role in enumerate(policy.roles):
        cluster.phases[f"e{i}"] = ROLES[role]
        await cluster.add(f"e{i}")
    await asyncio.sleep(SETTLE_S)
    served = await serve_load(cluster.front, requests, machine.slo)
    lasts_s = sum(p.lasts_s for p in phases)
    outcome = measured(served, machine.slo, lasts_s)
    outcome.flips_per_min = 60.0 * len(watch.flips) / lasts_s
    outcome.num_handovers = watch.num_handovers
    outcome.flips = watch.flips
    await cluster.close()
    return outcome


def measured(served: Sequence[Served], slo: SLO, lasts_s: float) -> Outcome:
    kept = [s for s in served if s.keeps(slo)]
    by_phase = {
        phase: [s.keeps(slo) for s in served if s.request.phase == phase]
        for phase in dict.fromkeys(s.request.phase for s in served)
    }
    ended = [s for s in served if s.ended]
    return Outcome(
        kept={phase: sum(keeps) / len(keeps) for phase, keeps in by_phase.items()},
        kept_all=len(kept) / len(served),
        kept_ttft=sum(s.keeps(SLO(ttft_ms=slo.ttft_ms)) for s in served) / len(served),
        kept_tpot=sum(s.keeps(SLO(tpot_ms=slo.tpot_ms)) for s in served) / len(served),
        goodput=len(kept) / lasts_s,
        num_lost=len(served) - len(ended),
        ttft_p90_ms=1000 * _p90([s.ttft_s for s in ended]),
        tpot_p90_ms=1000 * _p90([s.tpot_s for s in ended]),
        second_p50_ms=1000 * statistics.median([s.second_s for s in ended]),
        second_p90_ms=1000 * _p90([s.second_s for s in ended]),
    )


def _p90(values: list[float]) -> float:
    return sorted(values)[int(0.9 * len(values))] if values else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--machine", nargs="+", default=list(MACHINES), choices=list(MACHINES))
    parser.add_argument("--instances", type=int, nargs="+", default=[4])
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the phases, as a factor")
    parser.add_argument("--only", default="", help="policies whose name contains this")
    parser.add_argument("--flips", action="store_true", help="print each change of a role")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    cases = itertools.product(args.machine, args.loads, args.instances)
    with ProcessPoolExecutor(args.jobs, initializer=_be_quiet) as pool:
        for name, load, num in cases:
            chosen = [p for p in policies(num) if args.only in p.name]
            runs = [
                [
                    pool.submit(run_policy, MACHINES[name], policy, seed, args.scale, LOADS[load])
                    for seed in range(args.seeds)
                ]
                for policy in chosen
            ]
            print(f"\n{name}, {load}, {num} instances, {args.seeds} seeds", flush=True)
            print(f"{'policy':34}" + "".join(f"{h:>9}" for h in COLUMNS) + "   kept by phase", flush=True)
            for policy, futures in zip(chosen, runs, strict=True):
                outcomes = [future.result() for future in futures]
                case = {"machine": name, "load": load, "instances": num, "policy": policy.name}
                rows.append({**case, **show(policy.name, outcomes)})
                if args.flips:
                    print("\n".join(flip for outcome in outcomes for flip in outcome.flips), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def _be_quiet() -> None:
    logging.disable(logging.CRITICAL)


def show(name: str, runs: Sequence[Outcome]) -> dict[str, object]:
    """Print a line of means; the same as values."""

    def mean(of: str) -> float:
        return statistics.mean(float(getattr(run, of)) for run in runs)

    by_phase = {phase: statistics.mean(run.kept[phase] for run in runs) for phase in runs[0].kept}
    columns = "".join(f"{mean(of):9.{digits}f}" for of, digits in COLUMNS.values())
    print(f"{name:34}{columns}   " + " ".join(f"{v:.2f}" for v in by_phase.values()), flush=True)
    keys = [f for f in Outcome.__slots__ if f not in ("kept", "flips")]
    return {**{key: mean(key) for key in keys}, "kept": by_phase}


if __name__ == "__main__":
    main()
