"""Recompute or migrate: what a move costs either way, in predicted milliseconds. Pure.

Migration takes the KV pages along; it needs a source that still works and a way between the two engines
(`handover.pair`). Whichever branch is taken, both numbers are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.cost import StepCost, TransferCost

ASSUMED_LINK = TransferCost(latency_ms=1.0, bytes_per_ms=1_000_000.0)
"""1 GB/s: a modest wire, until transfers have been measured."""

SOURCE_GONE = "source_gone"
"""The obstacle that leaves nothing to migrate from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """A time is None when it cannot be predicted. `obstacle`: why it cannot migrate; "" = it can."""

    recompute_tokens: int
    recompute_ms: float | None
    migrate_ms: float | None
    obstacle: str = ""

    @property
    def migrates(self) -> bool:
        """Which branch is taken. Where a number is unknown the pages are taken along: that is the safer one,
        since a transfer that fails leaves the request where it runs."""
        if self.obstacle or self.migrate_ms is None or self.recompute_ms is None:
            return not self.obstacle
        return self.migrate_ms < self.recompute_ms

    def __str__(self) -> str:
        if self.migrates:
            migrate, recompute = _told(self.migrate_ms), _told(self.recompute_ms)
            return f"migrate: {migrate} (recompute {self.recompute_tokens} tokens: {recompute})"
        if self.recompute_ms is None:
            return f"recompute {self.recompute_tokens} tokens (cost unknown)"
        told = f"recompute {self.recompute_tokens} tokens in {self.recompute_ms:.1f} ms"
        if self.migrate_ms is None:
            return told
        gain_ms = self.recompute_ms - self.migrate_ms
        if self.obstacle and gain_ms > 0:
            return f"{told} (migrate would be cheaper by {gain_ms:.1f} ms, {self.obstacle})"
        return f"{told} (migrate: {self.migrate_ms:.1f} ms)"


def move_cost(
    num_tokens: int,
    num_matched: int,
    coefficients: Sequence[float],
    *,
    obstacle: str,
    page_bytes: int = 0,
    page_size: int = 64,
    link: TransferCost = ASSUMED_LINK,
) -> MoveCost:
    """Of a request whose next draw stands on `num_tokens`, `num_matched` of which the target can read.

    `coefficients` are the target's `StepCost` (empty = unknown). `page_bytes` 0 = unknown, and then nothing
    is said of migrating; else all pages travel, also those that the target has already.
    """
    rows = num_tokens - min(num_matched, max(0, num_tokens - 1))
    cost = StepCost.known(coefficients)
    num_bytes = -(-num_tokens // page_size) * page_bytes
    return MoveCost(
        recompute_tokens=rows,
        recompute_ms=None if cost is None else cost.prefill_ms(num_tokens, num_matched),
        migrate_ms=link.transfer_ms(num_bytes) if num_bytes > 0 and obstacle != SOURCE_GONE else None,
        obstacle=obstacle,
    )


def _told(ms: float | None) -> str:
    return "cost unknown" if ms is None else f"{ms:.1f} ms"
