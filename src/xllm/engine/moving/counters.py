"""What an engine has handed over and taken over so far. Nothing reads the counts to decide."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class MoveCounters:
    """`num_out` requests went, `num_in` came with KV that was used; bytes include prefixes."""

    num_out: int = 0
    num_in: int = 0
    num_failed: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    claimed_rows: int = 0
    """Rows that need not be computed, thanks to what arrived."""
