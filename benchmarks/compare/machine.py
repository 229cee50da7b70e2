"""What the numbers were measured on, and whether it was quiet: hardware, commit, CPU time of strangers."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_NOTABLE = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe() -> dict[str, str]:
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "cpu": f"{info.get('model name', platform.machine())} (family {info.get('cpu family', '?')}, "
        f"model {info.get('model', '?')})",
        "cores": f"{usable_cores()} usable, {psutil.cpu_count(logical=False)} physical",
        "instructions": " ".join(name for name in _NOTABLE if name in flags),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "commit": _commit(),
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    # Results of earlier runs are no change of what is measured.
    changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return f"{commit} with uncommitted changes" if changed else commit


def without_places(text: str, places: Mapping[str, Path]) -> str:
    """Results are committed: folders of this machine become the names that `make` gives them."""
    for name, path in places.items():
        text = text.replace(str(path.resolve()), name)
        if path.is_absolute():
            text = text.replace(str(path), name)
    return text.replace(f"{Path.home()}/", "~/")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds so far: of the whole machine, of it stolen by the hypervisor, and of this process."""

    busy_s: float
    steal_s: float
    own_s: float

    @classmethod
    def now(cls) -> CpuTimes:
        total, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = total.idle + getattr(total, "iowait", 0.0)
        # Guests' time stands in user as well, so summing all fields would count it twice.
        guests = getattr(total, "guest", 0.0) + getattr(total, "guest_nice", 0.0)
        steal = getattr(total, "steal", 0.0)
        return cls(sum(total) - idle - guests - steal, steal, own.user + own.system)

    def strangers_s(self, earlier: CpuTimes, engines_s: float) -> float:
        """Seconds since `earlier` that neither this process nor the engines used; stolen ones included."""
        busy = self.busy_s - earlier.busy_s + self.steal_s - earlier.steal_s
        return max(0.0, busy - (self.own_s - earlier.own_s) - engines_s)


def load_average() -> tuple[float, float, float]:
    return os.getloadavg()
