"""Speed of the native linear against this machine's limits: `python benchmarks/kernels/gemm.py [--shapes …]`.

Every call takes another copy of the matrix, so that weights come from memory as in a decode step. Activations
are rounded beforehand, as a step does once for several matrices. A cell is GFLOP/s (2 · rows · out · in per
call), their share of what registers alone allow, and the weight bytes read per second. Limits are measured in
the same run. By default the best of many calls, which a busy machine disturbs least; see `--median`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
CLASSES = {"bf16": 1, "w8": 2, "w4": 3}
COLD_BYTES = 96 << 20
EPILOGUES = {"store": 0, "silu": 2}


def limit_gflops(library: ctypes.CDLL, kind: str) -> float:
    """Best rate of one thread from registers; NaN where the path has none."""
    best = float("nan")
    for _ in range(40):
        before = time.perf_counter()
        operations = library.xn_multiply(CLASSES[kind], 20_000)
        rate = operations / (time.perf_counter() - before) * 1e-9
        if operations:
            best = rate if best != best else max(best, rate)
    return best


def limit_bandwidth(library: ctypes.CDLL, pool: int) -> float:
    """Best GB/s of reading memory that no cache holds."""
    memory = np.ones(256 << 20, dtype=np.uint8)
    best = 0.0
    for _ in range(12):
        before = time.perf_counter()
        library.xn_read_memory(pool, memory.ctypes.data, memory.nbytes)
        best = max(best, memory.nbytes / (time.perf_counter() - before) * 1e-9)
    return best


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


def seconds_per_call(
    library: ctypes.CDLL,
    pool: int,
    copies: list[int],
    rows: int,
    epilogue: int,
    budget_s: float,
    typical: Callable[[Sequence[float]], float],
) -> float:
    num_out, num_in = library.xn_matrix_num_out(copies[0]), library.xn_matrix_num_in(copies[0])
    x = np.random.default_rng(1).standard_normal((rows, num_in), dtype=np.float32)
    y = np.empty((rows, num_out), dtype=np.float32)
    stride = library.xn_rounded_stride(copies[0])
    memory = np.empty(stride * rows + 64, dtype=np.uint8)
    rounded = memory[-memory.ctypes.data % 64 :]
    library.xn_round_rows(pool, copies[0], x.ctypes.data, rows, num_in, rounded.ctypes.data)
    to, source = y.ctypes.data, rounded.ctypes.data
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < budget_s and len(times) < 2000):
        matrix = copies[len(times) % len(copies)]
        before = time.perf_counter()
        library.xn_linear_fused(pool, matrix, None, source, rows, 0, None, epilogue, None, 0, to, num_out)
        times.append(time.perf_counter() - before)
    return typical(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="qkv,o,gateup,down,head")
    parser.add_argument("--classes", default="bf16,w8,w4")
    parser.add_argument("--rows", default="1,4,8,16,32,64,512")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=0.15, help="seconds per cell")
    parser.add_argument("--epilogue", choices=EPILOGUES, default="store")
    parser.add_argument("--isa", help="this instruction-set path instead of the best")
    parser.add_argument("--median", action="store_true", help="the median call instead of the best")
    options = parser.parse_args()
    path, isa = find(None if options.isa is None else frozenset({options.isa}))
    if path is None:
        raise SystemExit(isa)
    library = open_library(path)
    pool = library.xn_pool_create(options.threads)
    rows = [int(r) for r in options.rows.split(",")]
    classes = options.classes.split(",")
    limits = {kind: options.threads * limit_gflops(library, kind) for kind in classes}
    print(f"{isa}, {options.threads} threads, load {os.getloadavg()[0]:.1f}; limits: ", end="")
    print(", ".join(f"{kind} {limit:.0f} GFLOP/s" for kind, limit in limits.items()), end="")
    print(f", read {limit_bandwidth(library, pool):.0f} GB/s")
    print("GFLOP/s, % of the limit, (GB/s of weights)")
    print(f"{'shape':<18}" + "".join(f"{'M' + str(r):>17}" for r in rows))
    for shape in options.shapes.split(","):
        num_out, num_in = SHAPES[shape]
        for kind in classes:
            # Clocks drift: the best seen so far is the limit.
            limits[kind] = max(limits[kind], options.threads * limit_gflops(library, kind))
            with matrices(library, pool, kind, num_out, num_in) as copies:
                size = library.xn_matrix_bytes(copies[0])
                cells = []
                for r in rows:
                    s = seconds_per_call(
                        library, pool, copies, r, EPILOGUES[options.epilogue], options.budget,
                        statistics.median if options.median else min,
                    )  # fmt: skip
                    rate = 2e-9 * r * num_out * num_in / s
                    cells.append(f"{rate:>5.0f} {100 * rate / limits[kind]:>3.0f}% ({size / s * 1e-9:>4.1f})")
            print(f"{shape + ' ' + kind:<18}" + "".join(f"{c:>17}" for c in cells), flush=True)
    library.xn_pool_destroy(pool)


if __name__ == "__main__":
    main()
