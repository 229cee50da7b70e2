"""Copies beside running steps rest in proportion to their work, so that they lengthen no step by much.

Only what nobody waits for is paced: a sequence that holds still, or a peer that has asked, gets full speed.
Whose turn it is must not be decided here.
"""

from __future__ import annotations

REST = 3.0
"""Times the processor time of the copying, at first. The receiver's part follows it: on a machine that both
engines share, copies take half a core from their steps."""
HURRY_S = 1.0
"""The rest shrinks until a transfer that has been under way for so long has none: its sequence grows
meanwhile, and gives up when it has grown by more than a page."""
_LEAST_REST_S = 0.002
"""Shorter rests are put together: the thread's waits are whole milliseconds."""


class Pacer:
    def __init__(self) -> None:
        self._until_s = 0.0
        self._owed_s = 0.0

    def worked(self, took_s: float, now_s: float, *, age_s: float, num_transfers: int) -> None:
        """`age_s` of the oldest of them. Several rest less, together as much as one: each has a sequence that
        grows."""
        patience = max(0.0, 1.0 - age_s / HURRY_S)
        self._owed_s += took_s * REST * patience / max(1, num_transfers)
        if self._owed_s >= _LEAST_REST_S:
            self._until_s, self._owed_s = now_s + self._owed_s, 0.0

    def rest_s(self, now_s: float) -> float:
        return max(0.0, self._until_s - now_s)
