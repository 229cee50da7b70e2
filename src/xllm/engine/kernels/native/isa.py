"""Instruction-set paths: what a CPU must have for each, and how its library is named.

Which path is taken is part of the numerics class. Nothing is compiled or opened here.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_HERE = Path(__file__).resolve().parent
LIBRARIES = _HERE / "_lib"
SOURCES = _HERE.parents[4] / "native"
"""Only in a source tree; an installed package has libraries alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """`cpu` = names in /proc/cpuinfo that must be present, `compiler` = flags for the compiler."""

    name: str
    cpu: frozenset[str]
    compiler: tuple[str, ...]


ISAS = (
    Isa(
        name="avx512bf16",
        cpu=frozenset("avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 f16c fma bmi2".split()),
        # gcc 12 knows no znver4; f16c is all that cooperlake lacks by name.
        compiler=("-march=cooperlake", "-mf16c", "-mprefer-vector-width=512"),
    ),
    Isa(name="avx2", cpu=frozenset("avx2 fma f16c bmi2".split()), compiler=("-march=haswell",)),
    Isa(name="portable", cpu=frozenset(), compiler=()),
)
"""Best first."""


def cpu_flags() -> frozenset[str]:
    """What this CPU calls its instruction sets; empty where the kernel does not say."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def usable(flags: frozenset[str]) -> tuple[Isa, ...]:
    """The paths that a CPU with these flags can run, best first."""
    return tuple(isa for isa in ISAS if isa.cpu <= flags)


def source_digest() -> str | None:
    """Digest of all that goes into a library; None without a source tree."""
    if not (SOURCES / "src").is_dir():
        return None
    digest = hashlib.sha256(platform.machine().encode())
    for isa in ISAS:
        digest.update(" ".join((isa.name, *isa.compiler)).encode())
    for path in sorted((*SOURCES.glob("src/*.cpp"), *SOURCES.glob("include/**/*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def library_path(isa: Isa, digest: str, directory: Path | None = None) -> Path:
    return (directory or LIBRARIES) / f"xllm_native-{isa.name}-{digest}.so"


def find_library(isa: Isa) -> Path | None:
    """The library of this path that belongs to the sources; in an installed package the only one."""
    digest = source_digest()
    if digest is not None:
        path = library_path(isa, digest)
        return path if path.is_file() else None
    return next(iter(sorted(LIBRARIES.glob(f"xllm_native-{isa.name}-*.so"))), None)
