"""The protocol of a usage store, and the store that keeps nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from xllm.service.usage.record import UsagePage, UsageQuery, UsageRecord


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """`num_lost` records could not be kept (queue full, or the store failed until the end)."""

    num_written: int = 0
    num_pending: int = 0
    num_lost: int = 0


class UsageStore(Protocol):
    """`add` returns at once and never raises: accounting must not stop serving."""

    def add(self, record: UsageRecord) -> None: ...

    async def totals(self, query: UsageQuery) -> UsagePage | None:
        """What is written by now; None = this store keeps nothing. Raises UnavailableError."""

    def counts(self) -> UsageCounts: ...

    async def close(self) -> None:
        """Write what is pending, for a bounded time."""


class NullUsageStore:
    """Usage is not recorded."""

    def add(self, record: UsageRecord) -> None:
        return

    async def totals(self, query: UsageQuery) -> UsagePage | None:
        return None

    def counts(self) -> UsageCounts:
        return UsageCounts()

    async def close(self) -> None:
        return
