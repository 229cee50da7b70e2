"""What transfers have come to, for snapshots and tests. Written by the I/O thread, read by any."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class TransferCounters:
    """`failed` by error code, both sides; `dropped` connections by code; `corrupt`: what came damaged.
    A refused message has reached no page."""

    num_sent: int = 0
    num_arrived: int = 0
    bytes_sent: int = 0
    bytes_arrived: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    refused_messages: int = 0
    corrupt: int = 0
