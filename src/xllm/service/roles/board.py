"""Which role each instance has, which one it still works off, and since when: labels with epochs.

Bookkeeping over plain values; time is an argument. Instances know nothing of roles: each can do everything,
so a switch is a word here and costs nothing there. Who switches, and why, is decided elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from xllm.config.instances import role_name
from xllm.errors import NotFoundError, RequestError
from xllm.types import MIXED, Phase

Phases = frozenset[Phase]

MAX_GONE = 256
"""Names without an instance whose role is remembered: one that comes back goes on where it was."""

STARTED = "started"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What an instance is used for. `old_phases` it has lost and still works off; empty = a stable pool.

    `epoch` grows with every change of it and is never used twice on a board. `former` is what it goes
    back to if no work of a phase that it has gained gets done (`unproven`). `pinned`: an operator has set it,
    and automatic control leaves it alone.
    """

    phases: Phases = MIXED
    old_phases: Phases = frozenset()
    epoch: int = 0
    since_s: float = 0.0
    reason: str = STARTED
    pinned: bool = False
    former: Phases | None = None
    unproven: Phases = frozenset()

    @property
    def role(self) -> str:
        return role_name(self.phases)

    @property
    def pool(self) -> str:
        """A stable pool has the role's name; in transition it names both."""
        if not self.old_phases:
            return self.role
        return f"{role_name(self.former or self.old_phases)}-to-{self.role}"


UNLISTED = Standing()
"""Of an instance that nobody told of."""


class RoleBoard:
    """One per front, on its loop. `num_switches` counts (from, to, reason)."""

    def __init__(self) -> None:
        self.num_switches: Counter[tuple[str, str, str]] = Counter()
        self._standings: dict[str, Standing] = {}
        self._present: set[str] = set()
        self._epoch = 0

    def standing(self, name: str) -> Standing:
        return self._standings.get(name, UNLISTED)

    def standings(self) -> dict[str, Standing]:
        """Of the instances that are there, by name."""
        return {name: self._standings[name] for name in sorted(self._present)}

    def joined(self, name: str, phases: Phases, now_s: float) -> Standing:
        """It has come, perhaps again: a role that it was given since its start is kept."""
        self._present.add(name)
        known = self._standings.get(name)
        if known is None:
            known = Standing(phases=phases, epoch=self._next_epoch(), since_s=now_s)
        # Its old work died with it, and what its new process can do it must show by working.
        self._standings[name] = replace(known, old_phases=frozenset(), former=None, unproven=frozenset())
        return self._standings[name]

    def left(self, name: str) -> None:
        """It is gone, or about to."""
        self._present.discard(name)
        gone = [known for known in self._standings if known not in self._present]
        for old in gone[: max(0, len(gone) - MAX_GONE)]:
            del self._standings[old]

    def switch(
        self,
        name: str,
        phases: Phases,
        now_s: float,
        reason: str,
        *,
        epoch: int | None = None,
        pinned: bool | None = None,
    ) -> Standing:
        """Give it another role, at once. `epoch`: the one that the caller decided upon; None = any.

        Raises NotFoundError, and RequestError `conflict` if the epoch is not the present one. The same
        role again changes no epoch. `pinned` None = as it was.
        """
        known = self._standings.get(name)
        if known is None or name not in self._present:
            raise NotFoundError("There is no such instance.", code="instance_not_found", param="instance")
        if epoch is not None and epoch != known.epoch:
            raise RequestError(
                f"The role has changed: its epoch is {known.epoch} now, not {epoch}. Read /v1/role again.",
                code="conflict",
                param="epoch",
            )
        if pinned is not None and pinned != known.pinned:
            known = self._standings[name] = replace(known, pinned=pinned)
        if phases == known.phases:
            return known
        self.num_switches[known.role, role_name(phases), reason] += 1
        self._standings[name] = replace(
            known,
            phases=phases,
            # What it had not finished of an earlier role stays to be worked off, unless it is its role again.
            old_phases=(known.phases | known.old_phases) - phases,
            epoch=self._next_epoch(),
            since_s=now_s,
            reason=reason,
            former=known.phases,
            unproven=phases - known.phases,
        )
        return self._standings[name]

    def drained(self, name: str, phase: Phase) -> None:
        """No work of the old phase is left on it."""
        known = self._standings.get(name)
        if known is not None and phase in known.old_phases:
            self._standings[name] = replace(known, old_phases=known.old_phases - {phase})

    def proven(self, name: str, phase: Phase) -> None:
        """Work of the phase got done there."""
        known = self._standings.get(name)
        if known is not None and phase in known.unproven:
            self._standings[name] = replace(known, unproven=known.unproven - {phase})

    def pools(self) -> Counter[str]:
        """How many instances each pool has."""
        return Counter(self._standings[name].pool for name in self._present)

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch


def keeps_floors(before: Collection[Phases], after: Collection[Phases]) -> bool:
    """Whether a model's instances may go from these roles to those: one takes prompts, one decodes, of four
    two decode. Where less was there before, it must not become less still."""
    floors: tuple[tuple[Phase, int], ...] = (("prefill", 1), ("decode", 2 if len(after) >= 4 else 1))
    return all(_num(phase, after) >= min(floor, _num(phase, before)) for phase, floor in floors)


def _num(phase: Phase, roles: Collection[Phases]) -> int:
    return sum(phase in phases for phases in roles)
