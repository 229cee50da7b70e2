"""What `instances` says: how many engines of which role a server starts. Text to numbers, nothing else."""

from __future__ import annotations

import re

from xllm.errors import ConfigError

MAX_LOCAL = 64
"""Beyond this a machine has no cores left to share, and the number is a slip of the keyboard."""

_PART = re.compile(r"([a-z]+):([0-9]{1,3})")
_ROLES = ("mixed",)
_LATER = ("prefill", "decode", "encode")


def parse_instances(text: str) -> dict[str, int]:
    """`mixed:2` → {"mixed": 2}; roles are separated by commas. Raises ConfigError."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"instances={text}: write role:count[,role:count], e.g. mixed:2", param="instances"
            )
        role, count = match[1], int(match[2])
        if role in _LATER:
            raise ConfigError(
                f"instances={text}: the role {role} is not yet supported; use mixed", param="instances"
            )
        if role not in _ROLES or role in counts:
            raise ConfigError(f"instances={text}: name the role mixed, once", param="instances")
        counts[role] = count
    if not 1 <= sum(counts.values()) <= MAX_LOCAL:
        raise ConfigError(
            f"instances={text}: start between 1 and {MAX_LOCAL} engines on one machine", param="instances"
        )
    return counts
