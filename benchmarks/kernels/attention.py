"""Attention over pages and the row operations: `python benchmarks/kernels/attention.py [--library a.so …]`.

Prints the best milliseconds of one step's calls through all layers, and beside attention what the step must
at least read and multiply. Several libraries are run in turns within one process, so that a change is judged
against what it replaces on the same minutes of the machine; their outputs are compared bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xllm.engine.kernels.native.library import find, open_library
from xllm.engine.kernels.native.plan import make_plan
from xllm.engine.kernels.ops import KVSpan
from xllm.types import KVGroup

Bytes = npt.NDArray[np.uint8]
Run = Callable[[int], None]
"""A call for one layer."""


@dataclass(frozen=True, slots=True)
class Model:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


MODELS = {
    "smollm2": Model(30, 9, 3, 64),
    "qwen2.5": Model(24, 14, 2, 64),
    "gemma3": Model(18, 4, 1, 256),
}

SHAPES = {
    "B1 ctx150": (1, 1, 150),
    "B1 ctx2000": (1, 1, 2000),
    "B8 ctx1024": (8, 1, 1024),
    "B64 ctx150": (64, 1, 150),
    "prefill 1x128": (1, 128, 128),
    "prefill 8x128": (8, 128, 128),
    "prefill 1x1024": (1, 1024, 1024),
    "chunk 64 of 1024": (1, 64, 1024),
}
"""Sequences, rows of each, and positions each holds with these rows."""


class Step:
    """One step's inputs, and pages for each library in an order as it is after a while."""

    def __init__(self, model: Model, shape: tuple[int, int, int], coded: Sequence[bool]) -> None:
        self.model = model
        self.coded = coded
        self.batch, self.num_rows, self.context = shape
        self.blocks = -(-self.context // 64)
        self.order = [int(p) for p in np.random.default_rng(0).permutation(self.batch * self.blocks)]
        self.pages = [self.filled(c) for c in coded]
        rows = self.batch * self.num_rows
        self.width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        self.qkv = np.random.default_rng(1).standard_normal((rows, self.width), dtype=np.float32)
        self.y = [np.zeros((rows, model.num_heads * model.head_dim), np.float32) for _ in coded]

    def filled(self, coded: bool) -> Bytes:
        """Pages of noise, so that highest scores rise as seldom as with a model."""
        m = self.model
        num_tiles = len(self.order) * 2 * m.num_layers * m.num_kv_heads
        noise = np.random.default_rng(2).standard_normal(64 * m.head_dim, dtype=np.float32)
        if coded:
            scales = np.full(64, 1 / 40, dtype=np.float32)
            tile = np.concatenate([(noise * 40).astype(np.int8).view(np.uint8), scales.view(np.uint8)])
        else:
            tile = (noise.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return np.tile(tile, num_tiles)

    def group(self) -> KVGroup:
        m = self.model
        return KVGroup(
            kind="full", layers=tuple(range(m.num_layers)), num_kv_heads=m.num_kv_heads, head_dim=m.head_dim
        )

    def call(self, library: ctypes.CDLL, pool: int, which: int) -> Run:
        m, width, size = self.model, self.width, self.model.head_dim
        spans = [
            KVSpan(
                row=i * self.num_rows,
                num_rows=self.num_rows,
                start=self.context - self.num_rows,
                pages=tuple(self.order[i * self.blocks : (i + 1) * self.blocks]),
            )
            for i in range(self.batch)
        ]
        plan = make_plan(library, self.group(), m.num_heads, spans, len(self.qkv))
        plan.struct.kv_class = int(self.coded[which])
        q = self.qkv.ctypes.data
        k = q + 4 * m.num_heads * size
        v = k + 4 * m.num_kv_heads * size
        pages, y = self.pages[which].ctypes.data, self.y[which]
        to = y.ctypes.data

        def run(layer: int) -> None:
            library.xn_attention(
                pool, plan.ptr, pages, layer, q, width, k, width, v, width, size**-0.5, 0.0, to, y.shape[1]
            )

        return run

    def limits(self) -> str:
        """MiB of K and V in bf16 that are read once, GFLOP of both products, millions of exponentials."""
        m = self.model
        first = self.context - self.num_rows
        seen = sum(range(first + 1, self.context + 1)) * self.batch * m.num_layers
        held = self.batch * self.context * m.num_layers * m.num_kv_heads * m.head_dim * 4
        flops, exps = 4e-9 * seen * m.num_heads * m.head_dim, 1e-6 * seen * m.num_heads
        return f"{held / 2**20:6.0f} MiB {flops:5.1f} GFLOP {exps:5.1f} Mexp"


def elementwise(library: ctypes.CDLL, pool: int, name: str, rows: int) -> Run:
    """One operation at SmolLM2's widths; the layer is ignored."""
    x = np.random.default_rng(0).standard_normal((rows, 3072), dtype=np.float32)
    y = np.empty_like(x)
    w = np.ones(3072, dtype=np.float32)
    a, b, c = x.ctypes.data, y.ctypes.data, w.ctypes.data
    calls: dict[str, Callable[[], object]] = {
        "silu_mul": lambda: library.xn_silu_mul(pool, a, 3072, rows, 1536, b, 1536),
        "gelu_mul": lambda: library.xn_gelu_tanh_mul(pool, a, 3072, rows, 1536, b, 1536),
        "rms_norm": lambda: library.xn_rms_norm(pool, a, rows, 1, 576, 576, c, 1e-6, 0.0, b, 576),
        "add": lambda: library.xn_add(pool, a, 576, b, 576, rows, 576, b, 576),
        "rope": lambda: library.xn_rope(pool, a, 960, rows, 12, 32, a, b, 32, b, 768),
    }
    one = calls[name]
    kept = (x, y, w)

    def run(layer: int) -> None:
        if kept and layer >= 0:
            one()

    return run


def best(runs: list[Run], num_layers: int, budget_s: float) -> list[float]:
    """Milliseconds of a step: the least of every layer, added up; one undisturbed call a layer will do."""
    least = [[float("inf")] * num_layers for _ in runs]
    end = time.perf_counter() + budget_s * len(runs)
    count = 0
    while count < 3 or time.perf_counter() < end:
        for run, times in zip(runs, least, strict=True):
            for layer in range(num_layers):
                before = time.perf_counter()
                run(layer)
                times[layer] = min(times[layer], time.perf_counter() - before)
        count += 1
    return [1e3 * sum(times) for times in least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", action="append", type=Path, help="default: the best that is built")
    parser.add_argument("--models", default="smollm2,qwen2.5,gemma3")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--kv", default="bf16,int8", help="what pages hold: a column for each")
    parser.add_argument("--rows", default="1,8,64,1024", help="of the row operations; empty = none")
    parser.add_argument("--operations", default="silu_mul,gelu_mul,rms_norm,add,rope")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=0.4, help="seconds per cell")
    options = parser.parse_args()
    paths = options.library or [find()[0]]
    if paths[0] is None:
        raise SystemExit(find()[1])
    libraries = [open_library(path) for path in paths]
    pools = [library.xn_pool_create(options.threads) for library in libraries]
    kinds = options.kv.split(",")
    variants = [(k, lib, pool) for lib, pool in zip(libraries, pools, strict=True) for k in kinds]
    print(
        f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; KV {options.kv}; "
        "best milliseconds of a step, all layers"
    )
    for name in filter(None, options.models.split(",")):
        for shape in options.shapes.split(","):
            step = Step(MODELS[name], SHAPES[shape], [kind == "int8" for kind, _, _ in variants])
            runs = [step.call(lib, pool, i) for i, (_, lib, pool) in enumerate(variants)]
            times = best(runs, MODELS[name].num_layers, options.budget)
            same = all(
                np.array_equal(y.view(np.uint32), step.y[i % len(kinds)].view(np.uint32))
                for i, y in enumerate(step.y)
            )
            print(
                f"{name:<8} {shape:<17}" + "".join(f"{t:>9.3f}" for t in times) + f"   {step.limits()}"
                + ("" if same else "   other bits"),
                flush=True,
            )  # fmt: skip
    for operation in filter(None, options.operations.split(",")):
        for rows in map(int, filter(None, options.rows.split(","))):
            times = best(
                [elementwise(lib, pools[i], operation, rows) for i, lib in enumerate(libraries)], 30, 0.15
            )
            print(f"{operation:<8} {rows:>5} rows x30 " + "".join(f"{t:>9.3f}" for t in times), flush=True)
    for library, pool in zip(libraries, pools, strict=True):
        library.xn_pool_destroy(pool)


if __name__ == "__main__":
    main()
