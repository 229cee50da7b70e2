"""Usage records: one row for each ended request, appended and never changed. Who used what, no content."""

from __future__ import annotations

from xllm.service.usage.record import Totals, UsagePage, UsageQuery, UsageRecord
from xllm.service.usage.recorder import UsageRecorder
from xllm.service.usage.store import NullUsageStore, UsageStore

__all__ = [
    "NullUsageStore",
    "Totals",
    "UsagePage",
    "UsageQuery",
    "UsageRecord",
    "UsageRecorder",
    "UsageStore",
]
