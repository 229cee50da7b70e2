"""Throughput of the native linear with cold weights: `python benchmarks/kernels/gemm.py [--shapes …]`.

Every call takes another copy of the matrix, so that weights come from memory as in a decode step. Prints
the median GFLOP/s (2 · rows · out · in per call) and the weight bytes read per second. Run it alone.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from xllm.engine.kernels.native.library import find, open_library

SHAPES = {
    "qkv": (960, 576),
    "o": (576, 576),
    "gateup": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
    "qwen-gateup": (9728, 896),
}
COLD_BYTES = 96 << 20


@contextmanager
def matrices(library: ctypes.CDLL, pool: int, kind: str, num_out: int, num_in: int) -> Iterator[list[int]]:
    """Copies of one random matrix that together exceed the caches."""
    rows = np.random.default_rng(0).standard_normal((num_out, num_in), dtype=np.float32) * np.float32(0.05)
    pack = {"bf16": library.xn_pack_bf16, "w8": library.xn_quantize_w8g32, "w4": library.xn_quantize_w4g32}[
        kind
    ]
    made: list[int] = []
    total = 0
    while total < COLD_BYTES or len(made) < 2:
        handle = ctypes.c_void_p()
        if pack(pool, rows.ctypes.data, num_out, num_in, ctypes.addressof(handle)) != 0:
            raise MemoryError("a matrix could not be packed")
        made.append(handle.value or 0)
        total += library.xn_matrix_bytes(handle)
    yield made
    for handle_value in made:
        library.xn_matrix_free(handle_value)


def seconds_per_call(library: ctypes.CDLL, pool: int, copies: list[int], rows: int, budget_s: float) -> float:
    """Median over single calls."""
    num_out, num_in = library.xn_matrix_num_out(copies[0]), library.xn_matrix_num_in(copies[0])
    x = np.random.default_rng(1).standard_normal((rows, num_in), dtype=np.float32)
    y = np.empty((rows, num_out), dtype=np.float32)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < budget_s and len(times) < 2000):
        matrix = copies[len(times) % len(copies)]
        before = time.perf_counter()
        library.xn_linear(pool, matrix, x.ctypes.data, rows, num_in, None, y.ctypes.data, num_out)
        times.append(time.perf_counter() - before)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="qkv,o,gateup,down,head")
    parser.add_argument("--classes", default="bf16,w8,w4")
    parser.add_argument("--rows", default="1,4,8,16,64,512")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=0.15, help="seconds per cell")
    options = parser.parse_args()
    path, isa = find()
    if path is None:
        raise SystemExit(isa)
    library = open_library(path)
    pool = library.xn_pool_create(options.threads)
    rows = [int(r) for r in options.rows.split(",")]
    print(f"{isa}, {options.threads} threads, load {os.getloadavg()[0]:.1f}; GFLOP/s (GB/s of weights)")
    print(f"{'shape':<20}" + "".join(f"{'M' + str(r):>14}" for r in rows))
    for shape in options.shapes.split(","):
        num_out, num_in = SHAPES[shape]
        for kind in options.classes.split(","):
            with matrices(library, pool, kind, num_out, num_in) as copies:
                size = library.xn_matrix_bytes(copies[0])
                cells = []
                for r in rows:
                    s = seconds_per_call(library, pool, copies, r, options.budget)
                    cells.append(f"{2e-9 * r * num_out * num_in / s:>7.0f} ({size / s * 1e-9:>4.0f})")
            print(f"{shape + ' ' + kind:<20}" + "".join(f"{c:>14}" for c in cells), flush=True)
    library.xn_pool_destroy(pool)


if __name__ == "__main__":
    main()
