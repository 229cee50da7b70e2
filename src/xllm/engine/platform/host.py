"""Facts about this host: cores that may run, instruction sets, drivers. Its memory is `room`'s."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterable
from pathlib import Path

from xllm.config.schema import PlatformConfig
from xllm.errors import ConfigError

_CPUINFO = Path("/proc/cpuinfo")
_CUDA_DRIVER = "libcuda.so.1"
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd")
# Four digits bound the work as well as the number of CPUs.
_CPU_SPAN = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def num_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_num_threads(config: PlatformConfig) -> tuple[int, str]:
    """(compute threads, report line)."""
    if config.num_threads:
        return config.num_threads, f"num_threads={config.num_threads}: as asked"
    cores, sharers = num_cores(), max(1, config.num_local_instances)
    threads = max(1, cores // sharers)
    if sharers == 1:
        return threads, f"num_threads={threads}: cores this process may use"
    return threads, f"num_threads={threads}: {cores} cores for {sharers} engines"


def bind_to_cpus(text: str | None) -> str | None:
    """Bind every thread of this process, and those it will start, to CPUs such as `0-3,8`; the report line.

    None leaves affinity as it was inherited. Raises ConfigError for text that is no such list and for a
    CPU that this process may not use: a smaller set than asked for would be a silent change of speed.
    """
    if text is None:
        return None
    cpus = parse_cpus(text)
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"cpus={text}: threads cannot be bound on this system", param="cpus")
    allowed = os.sched_getaffinity(0)
    if missing := sorted(cpus - allowed):
        raise ConfigError(
            f"cpus={text}: this process may not use CPU {missing[0]}; it may use {_spans(allowed)}",
            param="cpus",
        )
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(thread.name), cpus)
    return f"cpus={_spans(cpus)}: as asked"


def parse_cpus(text: str) -> frozenset[int]:
    """The CPUs of a list such as `0-3,8`, as taskset and numactl write it. Raises ConfigError."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = _CPU_SPAN.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"cpus={text}: write numbers and ranges, such as 0-3,8", param="cpus")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def _spans(cpus: Iterable[int]) -> str:
    """The opposite of `parse_cpus`."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
