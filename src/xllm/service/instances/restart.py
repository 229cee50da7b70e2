"""When a local engine is started again, and what its end was: decisions over plain values.

Time is an argument; no process, clock or event loop may live here.
"""

from __future__ import annotations

import signal

from xllm.service.failover.blame import DeathCause

DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Before the nth start after as many deaths in a row; the last one from then on."""

HEALTHY_S = 60.0
"""Who has served this long did not die of its start: the row begins anew."""

_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)


class Restarts:
    """The deaths of one engine slot. At once the first time, then slower and slower while it keeps dying."""

    def __init__(self) -> None:
        self.num_deaths = 0
        self._in_a_row = 0
        self._serving_since_s: float | None = None

    def serving(self, now_s: float) -> None:
        """The engine has loaded, proved itself and takes requests."""
        self._serving_since_s = now_s

    def died(self, now_s: float, cause: DeathCause = "unknown") -> float:
        """Seconds to wait before the next start. A start that failed is a death, too.

        An engine that served and was killed from outside is no loop: whoever kills it knows why.
        """
        since_s, self._serving_since_s = self._serving_since_s, None
        if since_s is not None and cause == "killed":
            self.num_deaths += 1
            return 0.0
        if since_s is not None and now_s - since_s >= HEALTHY_S:
            self._in_a_row = 0
        delay_s = DELAYS_S[min(self._in_a_row, len(DELAYS_S) - 1)]
        self._in_a_row += 1
        self.num_deaths += 1
        return delay_s


def cause_of_death(exit_code: int | None, *, stopped: bool, silent: bool) -> DeathCause:
    """What to hold against the requests that an engine had.

    `exit_code` None = it still runs; `stopped` = by a signal such as SIGSTOP, which is nobody's fault
    inside; `silent` = it made no progress while it ran.
    """
    if stopped:
        return "stopped"
    if silent:
        return "hang"  # killed for its silence, as a rule: the silence is what counts
    if exit_code in _FROM_OUTSIDE:
        return "killed"
    return "unknown" if exit_code is None or exit_code == 0 else "crash"
