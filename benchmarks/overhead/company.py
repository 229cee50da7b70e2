"""What a busy neighbour does to a step: as many busy processes as asked for beside all compute threads.

Threads that wait for one another in turn collapse here: a third thread beside two once tripled the step.
With fair shares, T threads and one neighbour on T cores cost (T + 1) ÷ T. The ratio is against the same
engine alone, rounds taken in turns; it means something on a machine that is otherwise idle only.

    python -m benchmarks.overhead.company --model smollm2
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from xllm.clock import SystemClock
from xllm.config.schema import EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.platform.host import bind_to_cpus, num_cores
from xllm.testing.null_engine import spec

SPIN = "while True: pass"
# Wakes a thousand times a second and computes for about a tenth of the time, as a front with streams does.
PULSE = """
import time
while True:
    end = time.perf_counter() + 1e-4
    while time.perf_counter() < end: pass
    time.sleep(9e-4)
"""


@contextlib.contextmanager
def neighbours(program: str, count: int) -> Iterator[None]:
    """Processes that run `program`; they inherit the CPUs that this one is bound to."""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(count)]
    try:
        time.sleep(0.2 if count else 0.0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps_ms(engine: BuiltEngine, name: str, num_seqs: int, num_steps: int) -> list[float]:
    """Durations of decode steps of a batch."""
    core = engine.core
    for i in range(num_seqs):
        prompt = tuple(100 + (i + j) % 64 for j in range(16))
        core.submit(spec(f"{name}-{i}", prompt, max_tokens=num_steps + 1, ignore_eos=True))
    times: list[float] = []
    while core.has_requests:
        start = time.perf_counter()
        _, frames = core.step()
        times.append((time.perf_counter() - start) * 1000)
        for frame in frames:
            core.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cpus", default=None, help="bind engine and neighbours, e.g. 0-1")
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    bind_to_cpus(args.cpus)
    threads = num_cores()
    config = EngineConfig(
        model=ModelConfig(model=args.model), platform=PlatformConfig(platform="native", num_threads=threads)
    )
    engine = build_engine(config, SystemClock(), lambda stage, seconds: None)
    cases = {"alone": (SPIN, 0), "one pulsing": (PULSE, 1), "one busy": (SPIN, 1), "two busy": (SPIN, 2)}
    for num_seqs in args.seqs:
        times: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(args.rounds):
            for name, (program, count) in cases.items():
                with neighbours(program, count):
                    times[name] += steps_ms(engine, f"{num_seqs}-{number}-{name}", num_seqs, args.steps)
        base = statistics.median(times["alone"])
        print(f"{num_seqs} sequences, {threads} threads on {num_cores()} cores: step in ms, median and p99")
        for name, all_ms in times.items():
            median, p99 = statistics.median(all_ms), sorted(all_ms)[int(len(all_ms) * 0.99)]
            print(f"  {name:12s} {median:8.2f} {p99:8.2f}   {median / base:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
