"""Facts about this host: memory that may still be used, cores that may run, instruction sets."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_CUDA_DRIVER = "libcuda.so.1"
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd")


def available_bytes() -> int:
    """Memory that can be taken without swapping: the kernel's estimate, within the cgroup's limit."""
    return min(_system_bytes(), _cgroup_bytes())


def num_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def isa() -> str:
    """The instruction sets that choose kernels, as one word of the numerics class."""
    for line in _read(_CPUINFO).splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return "+".join(f for f in _ISA_FLAGS if f in present) or "base"
    return "unknown"


def trim_heap() -> None:
    """Hand freed memory back to the system: what loading took in pieces, the C library keeps otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # a C library without it has its own way
        trim(ctypes.c_size_t(0))


def no_cuda_driver() -> str | None:
    """Why no library whatever can use a CUDA device here; None where one may."""
    try:
        ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return f"there is no device driver ({_CUDA_DRIVER}) on this machine"
    return None


def _system_bytes() -> int:
    for line in _read(_MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_bytes() -> int:
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return 1 << 62
    return max(0, int(limit) - int(used))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
