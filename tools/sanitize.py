"""Runs the native code under sanitisers: `make sanitize`. Clean, or it ends with an error.

Every path this processor can run, built apart under build/: addresses, leaks and undefined behaviour in the
C++ programs and the tests of the kernels; data races in the C++ programs, whose three threads share a pool.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from xllm.engine.kernels.native.build import build
from xllm.engine.kernels.native.isa import SOURCES, Isa, cpu_flags, library_path, source_digest, usable

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
COMPILER = "g++"
"""The runtimes are preloaded by the names that gcc gives them."""
COMMON = ("-g", "-O1", "-fno-omit-frame-pointer")
MEMORY = (*COMMON, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = (*COMMON, "-fsanitize=thread")
# What goes through whole processes is left out: the sanitised library does not reach those.
TESTS = ("gemm", "ops", "sampling", "programs", "queue", "bitwise", "weights_cache", "platform", "classes")
PROGRAMS = ("rows", "queue")
FAULT = """
import numpy as np, tests.native.sanitized
from tests.native.native_driver import library
x = np.zeros(10_000, dtype=np.float32)
y = np.zeros(10_100, dtype=np.float32)
at = y.ctypes.data
library().xn_add(None, x.ctypes.data, 10_100, at, 10_100, 1, 10_100, at, 10_100)
"""
ARGUMENTS = ("-q", "-x", "-n0", "-m", "not slow", "-p", "tests.native.sanitized", "-p", "no:cacheprovider")


def run(command: Sequence[str], settings: Mapping[str, str]) -> None:
    started = time.monotonic()
    done = subprocess.run(command, env={**os.environ, **settings}, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"== sanitize: {command[0]} ended with {done.returncode}")
    print(f"== sanitize: clean, {time.monotonic() - started:.0f} s", flush=True)


def made(isas: Sequence[Isa], flags: Sequence[str], directory: Path) -> list[Path]:
    """The libraries with these flags, and the C++ programs beside them."""
    lines = build(isas, extra=flags, directory=directory)
    print("\n".join(lines), flush=True)
    if any("failed" in line for line in lines):
        sys.exit("== sanitize: not built")
    options = ("-std=c++17", *flags, f"-I{SOURCES / 'include'}", "-pthread")
    for name in PROGRAMS:
        source, program = SOURCES / "tests" / f"{name}.cpp", directory / name
        subprocess.run([COMPILER, *options, str(source), "-o", str(program), "-ldl"], check=True)
    return [directory / name for name in PROGRAMS]


def runtime(name: str) -> str:
    done = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check_that_faults_are_seen(settings: Mapping[str, str]) -> None:
    """A read behind the end of memory that Python holds must end the process: else the rest shows nothing."""
    done = subprocess.run(
        [sys.executable, "-c", FAULT],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0 or "heap-buffer-overflow" not in done.stderr:
        sys.exit(f"== sanitize: a planted fault was not seen\n{done.stdout}{done.stderr}")
    print("== sanitize: a planted fault is seen", flush=True)


def main() -> None:
    digest = source_digest()
    if digest is None or shutil.which(COMPILER) is None or platform.machine() != "x86_64":
        sys.exit("== sanitize: this needs the source tree, g++ and x86-64")
    isas = usable(cpu_flags())
    programs = made(isas, MEMORY, BUILD / "memory")
    for program, isa in product(programs, isas):
        print(f"== sanitize: addresses, leaks, undefined behaviour: {program.name}, {isa.name}", flush=True)
        run(
            [str(program), str(library_path(isa, digest, BUILD / "memory"))],
            {"ASAN_OPTIONS": "detect_leaks=1"},
        )
    programs = made(isas, THREADS, BUILD / "threads")
    for program, isa in product(programs, isas):
        print(f"== sanitize: races: {program.name}, {isa.name}", flush=True)
        # Its runtime knows less address space than kernels now randomise over.
        before = [shutil.which("setarch") or "setarch", "--addr-no-randomize"]
        run([*before, str(program), str(library_path(isa, digest, BUILD / "threads"))], {})
    settings = {
        # libstdc++ goes along, or the runtime does not find the functions it wraps.
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        # Python frees little of what it holds at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    check_that_faults_are_seen(settings)
    print("== sanitize: addresses, undefined behaviour: tests of the kernels", flush=True)
    files = [path for each in TESTS if (ROOT / (path := f"tests/native/test_{each}.py")).is_file()]
    run([sys.executable, "-m", "pytest", *ARGUMENTS, *files, *sys.argv[1:]], settings)


if __name__ == "__main__":
    main()
