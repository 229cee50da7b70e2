"""Which request kills engines: deaths are counted against the requests that were on them.

A request that kills twice without a token in between is quarantined; one that got on since its last
death is cleared, so that kills from outside never add up to a verdict on an innocent. Pure.
"""

from __future__ import annotations

from typing import Literal, get_args

DeathCause = Literal["crash", "killed", "hang", "stopped", "unknown"]
"""crash: by its own doing (signal or exit code); killed: SIGKILL or SIGTERM from outside; hang: no
progress of a running process; stopped: by SIGSTOP; unknown: end of a remote connection."""

_WEIGHT: dict[DeathCause, float] = {
    "crash": 1.0,
    "hang": 1.0,
    "killed": 0.125,
    "stopped": 0.125,
    "unknown": 0.5,
}
# Engines killed from outside twice a second hit a request four times before its first token soon enough
# (one chance in eight at a resumption of half a second): such deaths may add up only after many.

QUARANTINE_AT = 2.0


def known_cause(word: object) -> DeathCause:
    """The cause by that name; anything else is unknown."""
    return next((cause for cause in get_args(DeathCause) if cause == word), "unknown")


class Blame:
    """What each request that has seen a death is charged with. Whoever ends a request must `forget` it.

    A charge names the instance, so that a suspect which comes back takes its charges with it: nothing died.
    """

    def __init__(self) -> None:
        self._charges: dict[str, tuple[int, list[tuple[str, float]]]] = {}

    def death(self, request_id: str, num_committed: int, cause: DeathCause, instance: str) -> bool:
        """Count a death of the request's engine; True = quarantine it now."""
        committed, charges = self._charges.get(request_id, (num_committed, []))
        charges = charges if committed == num_committed else []
        charges.append((instance, _WEIGHT[cause]))
        self._charges[request_id] = (num_committed, charges)
        return self._score(request_id) >= QUARANTINE_AT

    def acquit(self, instance: str) -> None:
        """The instance was only suspected and is back. Verdicts that were passed meanwhile stand."""
        for request_id, (_, charges) in tuple(self._charges.items()):
            charges[:] = [charge for charge in charges if charge[0] != instance]
            if not charges:
                del self._charges[request_id]

    def at_risk(self, request_id: str, num_committed: int) -> bool:
        """One more crash would quarantine it: no two such requests may be tried on one engine at once.

        Else the guilty one would take the others with it, which have had no time for a token.
        """
        committed, _ = self._charges.get(request_id, (num_committed, []))
        return committed == num_committed and self._score(request_id) >= QUARANTINE_AT - _WEIGHT["crash"]

    def forget(self, request_id: str) -> None:
        self._charges.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._charges)

    def _score(self, request_id: str) -> float:
        _, charges = self._charges.get(request_id, (0, []))
        return sum(weight for _, weight in charges)
