"""From the setting `usage_db` to a store."""

from __future__ import annotations

from pathlib import Path

from xllm.service.usage.sqlite import SqliteUsageStore
from xllm.service.usage.store import NullUsageStore, UsageStore


def open_usage_store(path: str | None) -> UsageStore:
    """None = usage is not recorded. Raises ConfigError when the file cannot be used."""
    return NullUsageStore() if path is None else SqliteUsageStore.open(Path(path).expanduser())
