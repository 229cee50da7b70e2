"""Recompute or migrate: what a move costs either way, in predicted milliseconds. Pure.

Migration needs the source alive and a transport between engines. None exists yet, so the answer is
always recompute; the other branch's number is told so that its worth is known before it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.cost import StepCost, TransferCost

HAS_TRANSPORT = False

ASSUMED_LINK = TransferCost(latency_ms=1.0, bytes_per_ms=1_000_000.0)
"""1 GB/s: a modest wire, until transfers have been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """None = cannot be predicted, or (migrate) there is nothing left to migrate from."""

    recompute_tokens: int
    recompute_ms: float | None
    migrate_ms: float | None

    @property
    def migrates(self) -> bool:
        """Which branch is taken."""
        return HAS_TRANSPORT and self._migrate_gains_ms > 0

    @property
    def _migrate_gains_ms(self) -> float:
        if self.recompute_ms is None or self.migrate_ms is None:
            return 0.0
        return self.recompute_ms - self.migrate_ms

    def __str__(self) -> str:
        if self.recompute_ms is None:
            return f"recompute {self.recompute_tokens} tokens (cost unknown)"
        told = f"recompute {self.recompute_tokens} tokens in {self.recompute_ms:.1f} ms"
        if self._migrate_gains_ms > 0 and not HAS_TRANSPORT:
            return f"{told} (migrate would be cheaper by {self._migrate_gains_ms:.1f} ms, no transport)"
        return told if self.migrate_ms is None else f"{told} (migrate: {self.migrate_ms:.1f} ms)"


def move_cost(
    num_tokens: int,
    num_matched: int,
    coefficients: Sequence[float],
    *,
    source_alive: bool,
    page_bytes: int = 0,
    page_size: int = 64,
    link: TransferCost = ASSUMED_LINK,
) -> MoveCost:
    """Of a request whose next draw stands on `num_tokens`, `num_matched` of which the target can read.

    `coefficients` are the target's `StepCost` (empty = unknown); `page_bytes` 0 = unknown.
    """
    rows = num_tokens - min(num_matched, max(0, num_tokens - 1))
    cost = StepCost.known(coefficients)
    migrate_ms: float | None = None
    if source_alive and page_bytes > 0:
        migrate_ms = link.transfer_ms(-(-rows // page_size) * page_bytes)
    return MoveCost(
        recompute_tokens=rows,
        recompute_ms=None if cost is None else cost.prefill_ms(num_tokens, num_matched),
        migrate_ms=migrate_ms,
    )
