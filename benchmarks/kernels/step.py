"""A step of the native runner, eager against replayed: `python benchmarks/kernels/step.py [--quantize …]`.

Steps of both kinds alternate, without sampling. Prints best and median processor time of the step thread
(with one thread: of the whole step), in which a busy machine shows less than in wall time. Pin it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np

from xllm.artifacts.resolve import resolve
from xllm.config.schema import CacheConfig, EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.plan import SequencePlan, StepPlan
from xllm.engine.platform.native import PLATFORM
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler
from xllm.types import PAGE_SIZE

MAX_LEN = 1024
SHAPES = ("1x1", "8x1", "64x1", "1x128", "1x512")


def make(model: str, quantize: str, num_threads: int) -> tuple[ModelRunner, int]:
    """(a runner with programs, its vocabulary)."""
    config = EngineConfig(
        model=ModelConfig(model=model, quantize=quantize),  # type: ignore[arg-type]
        cache=CacheConfig(num_pages=64 * MAX_LEN // PAGE_SIZE // 4),
        platform=PlatformConfig(platform="native", num_threads=num_threads, programs="on"),
    )
    source = resolve(model)
    built = PLATFORM.create_runner(source.arch(), source.tensors(), config, MAX_LEN, Sampler())
    if not isinstance(built.runner, ModelRunner):
        raise TypeError("the native platform made another runner")
    return built.runner, source.arch().vocab_size


def plan(num_sequences: int, rows: int, start: int, vocabulary: int, groups: int) -> StepPlan:
    """`rows` rows of each sequence from position `start` on; the last of them yields logits."""
    rng = np.random.default_rng(0)
    held = -(-(start + rows) // PAGE_SIZE)
    return StepPlan(
        step=0,
        sequences=tuple(
            SequencePlan(
                seq_id=i,
                start=start,
                tokens=tuple(int(t) for t in rng.integers(0, vocabulary, rows)),
                pages=(tuple(range(i * held, (i + 1) * held)),) * groups,
                first_logit_row=rows - 1,
            )
            for i in range(num_sequences)
        ),
    )


def alternate(runner: ModelRunner, step: StepPlan, budget_s: float) -> Iterator[tuple[str, list[float]]]:
    """Seconds of every step by kind; both kinds meet the same moments of a busy machine."""
    kinds = {"eager": None, "replayed": runner.programs}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(seconds["eager"]) < 5:
        for name, programs in kinds.items():
            runner.programs = programs
            began = time.thread_time()
            runner.execute(step)
            seconds[name].append(time.thread_time() - began)
    yield from seconds.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantize", default="none", choices=("none", "file", "w8g32", "w4g32"))
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="SEQUENCESxROWS")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape")
    arguments = parser.parse_args()
    runner, vocabulary = make(arguments.model, arguments.quantize, arguments.num_threads)
    groups = len(runner.kv_layout.groups)
    for shape in arguments.shapes:
        num_sequences, rows = map(int, shape.split("x"))
        # A decoding sequence has something to look back on; a prompt begins.
        step = plan(num_sequences, rows, 100 if rows == 1 else 0, vocabulary, groups)
        for name, seconds in alternate(runner, step, arguments.seconds):
            best, median = min(seconds) * 1e3, statistics.median(seconds) * 1e3
            print(f"{shape:>8} {name:9} best {best:8.3f} ms, median {median:8.3f} ms, {len(seconds)} steps")
    if runner.programs is not None:
        print(runner.programs.counters)


if __name__ == "__main__":
    main()
