"""How much memory the engines of this machine may take together: the system's, within every container.

Reads only. Both versions of control groups, each group above ours included, since any of them may be the one
whose limit kills. What must not live here: what the memory is used for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xllm.engine.fitting.plan import MIB, Room

_SHARED_PART = 5
"""On a machine without a container others want memory later: a fifth of what is free stays theirs."""

_UNLIMITED = 1 << 60
"""Version 1 writes no limit as the largest number that its counter holds."""


class Facts(NamedTuple):
    """Where to look; other roots are for tests."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")


class _Version(NamedTuple):
    limit: str
    usage: str
    inactive: str


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("memory.max", "memory.current", "inactive_file")


def measure_room(facts: Facts = Facts(), asked: int | None = None) -> Room:  # noqa: B008  a value
    """The room as it is now, with what this very process holds already; `asked` overrides all of it."""
    if asked is not None:
        return Room(asked, "memory_bytes")
    free, held = system_bytes(facts.proc), _held_bytes(facts.proc)
    shared = free - free // _SHARED_PART
    tightest = min(container_limits(facts), default=None)
    if tightest is not None and tightest[0] < shared:
        left, limit, group = tightest
        why = f"{left // MIB} MiB are left of the {limit // MIB} MiB of control group {group}"
        return Room(left + held, f"{why}, {held // MIB} MiB are ours")
    why = f"{free // MIB} MiB are free on this machine, a fifth of it stays for others"
    return Room(shared + held, f"{why}, {held // MIB} MiB are ours")


def available_bytes(facts: Facts = Facts()) -> int:  # noqa: B008  a value
    """Memory that can be taken now without swapping: the kernel's estimate, within every container."""
    return min((system_bytes(facts.proc), *(left for left, _, _ in container_limits(facts))))


def container_limits(facts: Facts) -> Iterator[tuple[int, int, str]]:
    """(bytes left, limit, name) of every control group with a limit that this process is in.

    Cache of files that nobody uses goes before anything is killed, so it counts as left.
    """
    for version, root, path in _hierarchies(facts):
        group = root / path
        while True:
            found = _left(group, version)
            if found is not None:
                yield (*found, f"/{group.relative_to(root)}".removesuffix("."))
            if group == root:
                break
            group = group.parent


def _hierarchies(facts: Facts) -> Iterator[tuple[_Version, Path, str]]:
    for line in _read(facts.proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # In a container with a namespace of its own the path may lead above what is mounted.
        inside = path.strip("/") if ".." not in path else ""
        if not controllers:
            yield from (
                (_V2, root, _present(root, inside)) for root in (facts.cgroup, facts.cgroup / "unified")
            )
        elif "memory" in controllers.split(","):
            root = facts.cgroup / "memory"
            yield _V1, root, _present(root, inside)


def _present(root: Path, path: str) -> str:
    """Without a namespace a container sees the host's path, but its own group at the root of the mount."""
    return path if (root / path).is_dir() else ""


def _left(group: Path, version: _Version) -> tuple[int, int] | None:
    limit, used = _read(group / version.limit).strip(), _read(group / version.usage).strip()
    if not limit.isdigit() or not used.isdigit() or int(limit) >= _UNLIMITED:
        return None
    found = re.search(rf"^{version.inactive} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    inactive = int(found[1]) if found else 0
    return max(0, int(limit) - max(0, int(used) - inactive)), int(limit)


def system_bytes(proc: Path) -> int:
    """The kernel's estimate of what can be taken without swapping; half of all where it gives none."""
    estimate = _kib(proc / "meminfo", "MemAvailable")
    return estimate or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _held_bytes(proc: Path) -> int:
    """Of this process, and nobody else's: it is in the plan, and free no more."""
    return _kib(proc / "self/status", "RssAnon")


def _kib(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _read(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
