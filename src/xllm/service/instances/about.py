"""What is known of an instance besides its connection: values for operators, never for decisions."""

from __future__ import annotations

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
