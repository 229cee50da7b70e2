"""What is known of an instance besides its connection: values for operators, never for decisions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

InstanceState = Literal["starting", "ready", "suspect", "draining", "lost"]
"""Only `ready` ones get requests. suspect → (ready | lost); draining → lost; lost is final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceAbout:
    """`pulses`: it is known to send pulses, so its silence counts from the first moment."""

    pid: int | None = None
    incarnation: str = ""
    address: str = "local"
    phases: tuple[str, ...] = ("prefill", "decode")
    num_restarts: int = 0
    pulses: bool = False
    endpoints: tuple[str, ...] = ()
    """Where it takes KV pages of its peers; empty = it cannot."""


MAX_ENDPOINTS = 8
_ENDPOINT = re.compile(r"[a-z][a-z0-9+]{0,15}:[\x21-\x7e]{1,240}")


def usable_endpoints(told: Iterable[str]) -> tuple[str, ...]:
    """Of what an instance tells, what may be passed on to its peers: kind:place, short, without blanks."""
    return tuple([e for e in told if _ENDPOINT.fullmatch(e)][:MAX_ENDPOINTS])


def endpoint_kinds(endpoints: Iterable[str]) -> tuple[str, ...]:
    """`tcp`, `unix` …, without the places; each once, best first."""
    return tuple(dict.fromkeys(e.partition(":")[0] for e in endpoints))
