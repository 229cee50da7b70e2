"""KV memory in one piece against page tables: kernel time, mappings, what handing pages on costs.

    python -m benchmarks.xtensor --out benchmarks/results/xtensor.json

Kernel times: one engine, one memory, the same pages; steps through spaces and through tables take turns. The
rest is policy on pages without content, and the system's own count of mappings; no HTTP, no server.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.compare import machine
from xllm.clock import SystemClock
from xllm.config import EngineConfig, SchedulerConfig
from xllm.config.load import from_keywords
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.kernels.native.spaces import SpaceMapper
from xllm.engine.kvtransfer.memory import anonymous_pages
from xllm.engine.memory.manager import PageManager
from xllm.engine.plan import NO_SPACE, SampleOp, SequencePlan, StepPlan
from xllm.engine.platform.null_mapper import NullMapper
from xllm.testing.null_engine import FULL, null_engine, spec
from xllm.types import PAGE_SIZE, SamplingParams

SHAPES = (
    ("decode", 64, 150, 1),
    ("decode", 8, 1024, 1),
    ("decode", 1, 1900, 1),
    ("prefill", 8, 0, 128),
    ("prefill", 1, 0, 1024),
)
"""(kind, sequences, context, rows of each)."""
ROOT = b"bench"

Load = Iterator[tuple[list[int] | None, list[int], int]]
"""(history that the answer is added to, prompt, length of the answer)."""


# -- kernel time ------------------------------------------------------------------------------------------


def kernel_times(model: str, rounds: int, num_threads: int | None) -> list[dict[str, Any]]:
    config = from_keywords(
        EngineConfig,
        {
            "model": model,
            "max_model_len": 2048,
            "num_pages": 320,
            "kv_memory": "xtensor",
            "num_threads": num_threads,
        },
    )
    engine = build_engine(config, SystemClock(), lambda stage, elapsed_s: None)
    return [one_shape(engine, *shape, rounds) for shape in SHAPES]


def one_shape(
    engine: BuiltEngine, kind: str, num: int, context: int, rows: int, rounds: int
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    each = -(-(context + rows) // PAGE_SIZE)
    pages = rng.permutation(num * each).reshape(num, each).tolist()
    mapper = None if engine.memory.spaces is None else engine.memory.spaces.mapper
    if not isinstance(mapper, SpaceMapper):
        raise SystemExit("the engine has no spaces")
    for space, table in enumerate(pages):
        for index, page in enumerate(table):
            mapper.map(space, 0, index, page)
    mapper.wait()
    plans = {way: step(pages, context, rows, way == "xtensor") for way in ("paged", "xtensor")}
    taken: dict[str, list[float]] = {way: [] for way in plans}
    cpu: dict[str, list[float]] = {way: [] for way in plans}
    drawn = {}
    for i in range(rounds + 2):
        for way in sorted(plans, reverse=bool(i % 2)):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            result = engine.runner.execute(plans[way])
            if i >= 2:
                taken[way].append((time.perf_counter() - began_s) * 1000)
                cpu[way].append((time.process_time() - began_cpu_s) * 1000)
            drawn[way] = [c.tokens[0].token_id for s in result.sequences for c in s.choices]
    if drawn["paged"] != drawn["xtensor"]:
        raise SystemExit("the two ways drew different tokens")
    ms = {way: median(times) for way, times in taken.items()}
    ratios = [x / p for x, p in zip(taken["xtensor"], taken["paged"], strict=True)]
    return {
        "shape": f"{kind} {num} x {context or rows}",
        **{f"{way}_ms": round(value, 3) for way, value in ms.items()},
        "ratio": round(median(ratios), 4),
        **{f"{way}_cpu_ms": round(median(times), 3) for way, times in cpu.items()},
    }


def step(pages: list[list[int]], context: int, rows: int, in_space: bool) -> StepPlan:
    sample = SampleOp(params=SamplingParams(temperature=0.0), seed=0, choices=(0,), offset=0)
    return StepPlan(
        step=1,
        sequences=tuple(
            SequencePlan(
                seq_id=i,
                start=context,
                tokens=tuple((7 * i + 13 * r) % 40_000 + 10 for r in range(rows)),
                pages=(tuple(table),),
                first_logit_row=rows - 1,
                sample=sample,
                space=i if in_space else NO_SPACE,
            )
            for i, table in enumerate(pages)
        ),
    )


# -- mappings ---------------------------------------------------------------------------------------------


def mappings(num_seqs: int = 64, length: int = 8192) -> dict[str, Any]:
    """Of so many sequences over pages in random order, as the manager and as the system counts them."""
    before, each = in_maps(), length // PAGE_SIZE
    shared = anonymous_pages("bench")
    if shared is None:
        raise SystemExit("this system has no anonymous files")
    mapper = SpaceMapper(shared, 1, each, num_seqs)
    mapper.memory(num_seqs * each, 4096)
    memory = PageManager((FULL,), [num_seqs * each], False)
    memory.map_into(mapper)
    tables = [memory.new_table(ROOT) for _ in range(num_seqs)]
    # A page at a time in turns: what stands side by side in a space does not in the file.
    for length_now in range(PAGE_SIZE, length + 1, PAGE_SIZE):
        for table in tables:
            memory.grow(table, length_now)
    began_s = time.perf_counter()
    mapper.wait()
    counted = memory.map_counts()
    return {
        "sequences": f"{num_seqs} x {length}",
        "counted": counted["kv_mappings"],
        "in_proc_maps": in_maps() - before,
        "limit": mapper.max_mappings,
        "mapped": counted["kv_maps"],
        "mapped_after_s": round(time.perf_counter() - began_s, 2),
    }


def in_maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


# -- policy -----------------------------------------------------------------------------------------------


def random_prompts(rng: random.Random) -> Load:
    while True:
        yield None, words(rng, 50, 900), rng.randrange(20, 400)


def system_prompts(rng: random.Random) -> Load:
    heads = [words(rng, 300, 301) for _ in range(20)]
    while True:
        yield None, rng.choice(heads) + words(rng, 20, 300), rng.randrange(20, 400)


def conversations(num_users: int) -> Callable[[random.Random], Load]:
    def load(rng: random.Random) -> Load:
        users: list[list[int]] = [[] for _ in range(num_users)]
        while True:
            history = rng.choice(users)
            if len(history) > 1500:
                history.clear()
            history.extend(words(rng, 20, 200))
            yield history, list(history), rng.randrange(20, 300)

    return load


def words(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(1 << 30) for _ in range(rng.randrange(least, most))]


LOADS: dict[str, Callable[[random.Random], Load]] = {
    "random prompts": random_prompts,
    "20 system prompts": system_prompts,
    "60 conversations": conversations(60),
    "200 conversations": conversations(200),
}


def policy(name: str, num_pages: int, num_requests: int, *, caching: bool, in_spaces: bool) -> dict[str, Any]:
    """Hit rate, and the share of pages that stood where they were wanted; the first third warms up."""
    memory = PageManager((FULL,), [num_pages], caching)
    if in_spaces:
        memory.map_into(NullMapper(1, num_pages + 16, 32))
    rng = random.Random(5)
    load, running = LOADS[name](rng), []
    num_done = hits = asked = 0
    base: dict[str, int] | None = None
    while num_done < num_requests:
        while len(running) < 16:
            history, tokens, answer = next(load)
            table = memory.match(ROOT, tokens, len(tokens) - 1)
            if not memory.grow(table, len(tokens)):
                memory.release(table)
                break
            if base is not None:
                hits += len(table.chain) * PAGE_SIZE
                asked += len(tokens)
            memory.computed(table, tokens, len(tokens))
            running.append((history, tokens, [rng.randrange(1 << 30) for _ in range(answer)], table))
        for entry in list(running):
            history, tokens, answer_tokens, table = entry
            tokens.append(answer_tokens.pop())
            grew = memory.grow(table, len(tokens))
            if grew:
                memory.computed(table, tokens, len(tokens))
            if not grew or not answer_tokens or len(tokens) >= 2047:
                if grew and history is not None:
                    history[:] = tokens
                memory.release(table)
                running.remove(entry)
                num_done += 1
        if base is None and num_done >= num_requests // 3:
            base = memory.map_counts()
    made: dict[str, Any] = {
        "load": name,
        "pages": num_pages,
        "caching": caching,
        "memory": "xtensor" if in_spaces else "paged",
        "hit_rate": round(hits / max(1, asked), 4),
    }
    if in_spaces and base is not None:
        now = memory.map_counts()
        kept, placed = (now[key] - base[key] for key in ("kv_kept_pages", "kv_placed_pages"))
        made |= {"kept_share": round(kept / (kept + placed), 4), "mappings": now["kv_mappings"]}
    return made


def edge_of_memory(in_spaces: bool, num_requests: int = 60) -> dict[str, Any]:
    """A queue that never runs dry over a pool that is too small: how much of it is in use."""
    spaces = NullMapper(1, 64, 32) if in_spaces else None
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512)
    engine = null_engine(num_pages=64, config=config, spaces=spaces)
    rng = random.Random(3)
    for i in range(num_requests):
        prompt = tuple(rng.randrange(3, 500) for _ in range(rng.randrange(50, 500)))
        engine.core.submit(spec(f"r{i}", prompt, max_tokens=rng.randrange(20, 200), ignore_eos=True))
    used = []
    while engine.core.has_requests:
        engine.step()
        if engine.core.snapshot().num_waiting:
            used.append(engine.core.snapshot().owned_pages / 64)
    last = engine.core.snapshot()
    return {
        "memory": "xtensor" if in_spaces else "paged",
        "pool_in_use": round(sum(used) / len(used), 4),
        "steps": last.step,
        "preemptions": last.num_preemptions,
        "late_decodes": last.kv_late_decodes,
    }


# -- whole engine -----------------------------------------------------------------------------------------


def whole_engine(model: str, num_requests: int) -> dict[str, Any]:
    """Random prompts through scheduler and native kernels: what was not mapped in time once it is warm."""
    config = from_keywords(
        EngineConfig,
        {"model": model, "max_model_len": 2048, "num_pages": 160, "max_num_seqs": 16, "kv_memory": "xtensor"},
    )
    core = build_engine(config, SystemClock(), lambda stage, elapsed_s: None).core
    rng = random.Random(9)

    def play(first: int, count: int) -> None:
        for i in range(first, first + count):
            prompt = tuple(rng.randrange(10, 40_000) for _ in range(rng.randrange(40, 500)))
            core.submit(spec(f"r{i}", prompt, max_tokens=rng.randrange(20, 150), ignore_eos=True))
        while core.has_requests:
            _, frames = core.step()
            for frame in frames:
                core.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))

    play(0, num_requests)
    warm = core.snapshot()
    play(num_requests, num_requests)
    now = core.snapshot()
    parts = now.kv_contiguous - warm.kv_contiguous
    late = now.kv_late - warm.kv_late
    kept, placed = now.kv_kept_pages - warm.kv_kept_pages, now.kv_placed_pages - warm.kv_placed_pages
    core.close()
    return {
        "synchronous_maps": 0,  # there is no such thing: what is late is read through its table
        "parts": parts + late,
        "late_parts": late,
        "late_decodes": now.kv_late_decodes - warm.kv_late_decodes,
        "kept_share": round(kept / max(1, kept + placed), 4),
        "unmaps": now.kv_unmaps,
        "mappings": now.kv_mappings,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.xtensor", description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each way and shape")
    parser.add_argument("--num-threads", type=int, help="one makes CPU time comparable on a busy machine")
    parser.add_argument("--requests", type=int, default=2000, help="of each simulated load")
    parser.add_argument("--engine-requests", type=int, default=60, help="through the whole engine, twice")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine.describe()}

    def tell(part: str, value: Any) -> None:
        report.setdefault(part, []).append(value)
        print(f"{part}: {json.dumps(value)}", flush=True)

    for row in kernel_times(asked.model, asked.rounds, asked.num_threads):
        tell("kernel time", row)
    tell("mappings", mappings())
    tell("whole engine", whole_engine(asked.model, asked.engine_requests))
    for in_spaces in (False, True):
        tell("edge of memory", edge_of_memory(in_spaces))
    for name in LOADS:
        for in_spaces in (False, True):
            tell("policy", policy(name, 400, asked.requests, caching=True, in_spaces=in_spaces))
    tell("policy", policy("random prompts", 400, asked.requests, caching=False, in_spaces=True))
    if asked.out is not None:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
