"""How a hand-over ended, as observers are told. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["done", "failed", "unneeded"]
Reason = Literal["prefill", "drain", "rebalance", "asked"]
"""Why a request is to go elsewhere: its prompt is computed (prefill), its instance leaves, its instance is
too slow, or somebody asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverRecord:
    """`code` says why it is not `done`. `wait_s`: from the order until its outcome; of a prefill most of it
    is the prefill. `transfer_ms`, `exposed_ms`: as the source measured them (`wire.messages.Moved`)."""

    request_id: str
    attempt: int
    source: str
    target: str
    reason: Reason
    mode: str
    outcome: Outcome
    code: str = ""
    num_bytes: int = 0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0
    predicted_ms: float = 0.0
    wait_s: float = 0.0

    @property
    def hidden_share(self) -> float | None:
        """Of the transfer's time, what passed beside computing; None = nothing was measured."""
        if self.transfer_ms <= 0:
            return None
        return min(1.0, max(0.0, 1.0 - self.exposed_ms / self.transfer_ms))
