"""Copies beside running steps rest in proportion to their work, so that they lengthen no step by much.

Only what nobody waits for is paced: a sequence that holds still, or a peer that has asked, gets full speed.
Whose turn it is must not be decided here.
"""

from __future__ import annotations

REST = 3.0
"""Times the processor time of the copying. The receiver's part follows it, so on a machine that both engines
share copies take two quarters of a core from their steps, for as long as they last."""
HURRY_S = 1.0
"""A transfer that has been under way for longer is not paced any more: its sequence grows meanwhile, and one
that grows by a page more than was leased gives up."""
_LEAST_REST_S = 0.002
"""Shorter rests are put together: the thread's waits are whole milliseconds."""


class Pacer:
    def __init__(self) -> None:
        self._until_s = 0.0
        self._owed_s = 0.0

    def worked(self, took_s: float, now_s: float, num_transfers: int) -> None:
        """Several transfers rest less, together as much as one: each of them has a sequence that grows."""
        self._owed_s += took_s * REST / max(1, num_transfers)
        if self._owed_s >= _LEAST_REST_S:
            self._until_s, self._owed_s = now_s + self._owed_s, 0.0

    def rest_s(self, now_s: float) -> float:
        return max(0.0, self._until_s - now_s)
