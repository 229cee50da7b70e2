"""The engine's step alone, in this process: prefill and decode tokens/s by class; machine peaks.

    python -m benchmarks.native_step --model smollm2 --peers-dir .peers --out ceilings.json

No HTTP, scheduler or detokeniser: what these figures say is the most that an engine around this step can
reach, and `benchmarks.compare --with-ceilings` divides by them. Random tokens, greedy sampling.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.compare import machine
from benchmarks.compare.weights import GGUF_TYPES, bytes_per_token, encode, location
from xllm.clock import SystemClock
from xllm.config import EngineConfig
from xllm.config.load import from_keywords
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.kernels.native.build import COMPILERS
from xllm.engine.plan import SampleOp, SequencePlan, StepPlan
from xllm.types import PAGE_SIZE, SamplingParams

PEAKS = Path(__file__).parent / "kernels" / "peaks.cpp"
PREFILLS = ((8, 128), (1, 1024))
BATCHES = (1, 4, 8, 16, 32, 64)
CONTEXT_LEN = 128
NUM_STEPS = 64
"""Decode covers contexts 128 to 192: the prompt of the comparison, and its answer."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


@dataclass(slots=True)
class Driven:
    """A sequence on pages of its own, driven without a scheduler."""

    seq_id: int
    tokens: list[int]
    pages: tuple[int, ...]
    computed: int = 0

    def plan(self) -> SequencePlan:
        """All rows that are not computed yet; the last one is sampled."""
        tokens = tuple(self.tokens[self.computed :])
        used = -(-len(self.tokens) // PAGE_SIZE)
        return SequencePlan(
            seq_id=self.seq_id,
            start=self.computed,
            tokens=tokens,
            pages=(self.pages[:used],),
            first_logit_row=len(tokens) - 1,
            sample=SampleOp(params=GREEDY, seed=0, choices=(0,), offset=len(self.tokens) - CONTEXT_LEN),
        )


def sequences(rng: np.random.Generator, num: int, length: int, vocab: int) -> list[Driven]:
    room = -(-(length + NUM_STEPS + 1) // PAGE_SIZE)
    return [
        Driven(
            seq_id=i,
            tokens=rng.integers(0, vocab, size=length).tolist(),
            pages=tuple(range(i * room, (i + 1) * room)),
        )
        for i in range(num)
    ]


def step(runner: Any, batch: Sequence[Driven]) -> float:
    """Seconds of one step; every sequence gets its token."""
    plan = StepPlan(step=0, sequences=tuple(one.plan() for one in batch))
    began = time.perf_counter()
    result = runner.execute(plan)
    elapsed_s = time.perf_counter() - began
    for one, part in zip(batch, result.sequences, strict=True):
        if part.error is not None:
            raise part.error.to_error()
        one.computed = len(one.tokens)
        one.tokens.append(part.choices[0].tokens[0].token_id)
    return elapsed_s


def prefill(runner: Any, vocab: int, num: int, length: int, repeats: int) -> float:
    """Tokens/s of one step that computes whole prompts."""
    rng = np.random.default_rng(num)
    step(runner, sequences(rng, num, length, vocab))
    times = [step(runner, sequences(rng, num, length, vocab)) for _ in range(repeats)]
    return num * length / median(times)


def decode(runner: Any, vocab: int, num: int, repeats: int) -> float:
    """Tokens/s: the median step of every repeat, and the median of those."""
    rng = np.random.default_rng(num)
    found = []
    for _ in range(repeats):
        batch = sequences(rng, num, CONTEXT_LEN, vocab)
        for start in range(0, num, 8):
            step(runner, batch[start : start + 8])
        found.append(median(step(runner, batch) for _ in range(NUM_STEPS)))
    return num / median(found)


def built(model: Path, quantize: str, threads: int) -> BuiltEngine:
    pages = max(BATCHES) * -(-(CONTEXT_LEN + NUM_STEPS + 1) // PAGE_SIZE) + 32
    keywords = {
        "model": str(model),
        "platform": "native",
        "quantize": quantize,
        "num_threads": threads,
        "num_pages": pages,
        "max_model_len": 2048,
        "max_num_batched_tokens": max(num * length for num, length in PREFILLS),
        "max_num_seqs": max(BATCHES),
    }
    return build_engine(from_keywords(EngineConfig, keywords), SystemClock(), lambda *_: None)


def measure(folder: Path, weights: str, threads: int, repeats: int, batches: Sequence[int]) -> dict[str, Any]:
    gguf = weights != "bf16"
    engine = built(location(folder, weights, gguf=gguf), "file" if gguf else "none", threads)
    if len(engine.runner.kv_layout.groups) != 1:
        raise SystemExit("this measures models with one KV group")
    vocab = engine.core.card.vocab_size
    try:
        return {
            "prefill": {f"{n}x{le}": prefill(engine.runner, vocab, n, le, repeats) for n, le in PREFILLS},
            "decode": {str(num): decode(engine.runner, vocab, num, repeats) for num in batches},
            "weight_bytes": bytes_per_token(folder, weights),
            "report": list(engine.report),
        }
    finally:
        engine.runner.close()


def peaks(threads: int) -> dict[str, Any]:
    """Of the machine; empty without a compiler. {"read_gb_s": {"1": {"best", "median"}, …}, …}"""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as room:
        program = str(Path(room, "peaks"))
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run([compiler, *flags, str(PEAKS), "-o", program], check=True)
        done = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ceilings(
    model: str, weights_dir: Path, classes: Sequence[str], threads: int, repeats: int, batches: Sequence[int]
) -> dict[str, Any]:
    """Everything of one run, ready for JSON."""
    folder = encode(model, weights_dir)
    return {
        "model": model,
        "machine": machine.describe(),
        "threads": threads,
        "load average before": machine.load_average(),
        "peaks": peaks(threads),
        "classes": {weights: measure(folder, weights, threads, repeats, batches) for weights in classes},
    }


def bandwidth(found: dict[str, Any]) -> float:
    """Bytes/s that the threads of the run read together at best; NaN when it was not measured."""
    rates = found["peaks"].get("read_gb_s", {})
    return max((rate["best"] for rate in rates.values()), default=math.nan) * 1e9


def table(found: dict[str, Any]) -> str:
    lines = []
    for name, rates in found["peaks"].items():
        told = ", ".join(f"{t} threads {r['best']:.1f} (median {r['median']:.1f})" for t, r in rates.items())
        lines.append(f"{name}: {told}")
    for weights, row in found["classes"].items():
        told = ", ".join(f"{shape} {speed:.0f}" for shape, speed in row["prefill"].items())
        lines.append(f"{weights:<5} prefill tokens/s: {told}")
        told = ", ".join(f"{num}: {speed:.0f}" for num, speed in row["decode"].items())
        lines.append(f"{weights:<5} decode tokens/s by batch: {told}")
        alone = row["decode"].get("1", math.nan) * row["weight_bytes"] / bandwidth(found)
        lines.append(f"{weights:<5} one sequence: {alone:.0%} of bandwidth ÷ {row['weight_bytes'] >> 20} MiB")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peers-dir", type=Path, default=Path(".peers"))
    parser.add_argument("--classes", nargs="+", choices=[*GGUF_TYPES], default=["bf16", "q8_0", "q4_1"])
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--out", type=Path, help="JSON, for benchmarks.compare --ceilings")
    args = parser.parse_args()
    found = ceilings(
        args.model, args.peers_dir / "weights", args.classes, args.threads, args.repeats, args.batches
    )
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
