"""Names of roles, and what `instances` says: how many engines of which role a server starts.

Text to values and back, nothing else. A role is a set of phases; the names are shorthand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from xllm.errors import ConfigError
from xllm.types import DECODE, MIXED, PREFILL, Phase

MAX_LOCAL = 64
"""Beyond this a machine has no cores left to share, and the number is a slip of the keyboard."""

ROLES: Mapping[str, frozenset[Phase]] = {"mixed": MIXED, "prefill": PREFILL, "decode": DECODE}

_ORDER: tuple[Phase, ...] = ("encode", "prefill", "decode")
_PART = re.compile(r"([a-z]+):([0-9]{1,3})")
_LATER = ("encode",)


def role_name(phases: Collection[str]) -> str:
    """The name of a set of phases; one without a name is told phase by phase."""
    return next((name for name, role in ROLES.items() if role == set(phases)), "+".join(sorted(phases)))


def phases_in_order(phases: Collection[Phase]) -> tuple[Phase, ...]:
    """As messages and pages show them."""
    return tuple(phase for phase in _ORDER if phase in phases)


def parse_instances(text: str) -> dict[str, int]:
    """`prefill:1,decode:2` → {"prefill": 1, "decode": 2}, in the order given. Raises ConfigError."""
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
                f"instances={text}: the role {role} is not yet supported; use {', '.join(ROLES)}",
                param="instances",
            )
        if role not in ROLES or role in counts:
            raise ConfigError(
                f"instances={text}: name each of the roles {', '.join(ROLES)} at most once", param="instances"
            )
        counts[role] = count
    if not 1 <= sum(counts.values()) <= MAX_LOCAL:
        raise ConfigError(
            f"instances={text}: start between 1 and {MAX_LOCAL} engines on one machine", param="instances"
        )
    _check_complete(text, counts)
    return counts


def roles_of(counts: Mapping[str, int]) -> tuple[frozenset[Phase], ...]:
    """One role per engine. Those that take prompts come first: the first engine is up before the others."""
    names = sorted(counts, key=lambda name: "prefill" not in ROLES[name])
    return tuple(ROLES[name] for name in names for _ in range(counts[name]))


def _check_complete(text: str, counts: Mapping[str, int]) -> None:
    for phase, verb in (("prefill", "takes prompts"), ("decode", "decodes")):
        if not any(count and phase in ROLES[role] for role, count in counts.items()):
            raise ConfigError(
                f"instances={text}: no engine {verb}; add {phase}:1 or mixed:1", param="instances"
            )
