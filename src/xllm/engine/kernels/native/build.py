"""Compiles the native kernels: `python -m xllm.engine.kernels.native.build [isa …]`.

One shared object per instruction-set path, named by the digest of its sources; what is there is kept.
Run by `make setup` and by whoever builds a wheel, never on import.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xllm.engine.kernels.native.isa import ISAS, SOURCES, Isa, library_path, source_digest

COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-pthread",
    "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
)  # fmt: skip
_PARALLEL = 2


def build(isas: Sequence[Isa], *, extra: Sequence[str] = (), directory: Path | None = None) -> list[str]:
    """Build what is missing; a line per path that says what was done or why not.

    `extra` flags do not show in a library's name, so they want a `directory` of their own.
    """
    digest = source_digest()
    if digest is None:
        return ["native kernels: no source tree here; nothing to build"]
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return [f"native kernels: no C++ compiler ({', '.join(COMPILERS)}); the reference platform serves"]
    return [_build_one(compiler, isa, library_path(isa, digest, directory), extra) for isa in isas]


def _build_one(compiler: str, isa: Isa, target: Path, extra: Sequence[str]) -> str:
    if target.is_file():
        return f"native kernels: {isa.name}: up to date"
    if platform.machine() != "x86_64" and isa.compiler:
        return f"native kernels: {isa.name}: not for {platform.machine()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = (*FLAGS, *isa.compiler, *extra, f"-I{SOURCES / 'include'}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as room:
        sources = sorted((SOURCES / "src").glob("*.cpp"))
        objects = [Path(room) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            runs = [
                pool.submit(_run, [compiler, *flags, "-c", str(source), "-o", str(made)])
                for source, made in zip(sources, objects, strict=True)
            ]
            failed = [error for run in runs if (error := run.result())]
        library = Path(room) / target.name
        if not failed:
            link = [compiler, "-shared", "-pthread", "-Wl,-z,defs", *extra, *map(str, objects)]
            failed = [error for error in [_run([*link, "-o", str(library)])] if error]
        if failed:
            return f"native kernels: {isa.name}: the compiler failed\n" + "\n".join(failed)
        # Another process may build the same; a rename gives both a whole file.
        library.replace(target)
    for old in target.parent.glob(f"xllm_native-{isa.name}-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return f"native kernels: {isa.name}: built {target.name}"


def _run(command: list[str]) -> str:
    """What the compiler said when it failed, else nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def main(arguments: Sequence[str]) -> int:
    unknown = set(arguments) - {isa.name for isa in ISAS}
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(isa.name for isa in ISAS)}")
        return 2
    lines = build([isa for isa in ISAS if not arguments or isa.name in arguments])
    print("\n".join(lines))
    return 1 if any("failed" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
