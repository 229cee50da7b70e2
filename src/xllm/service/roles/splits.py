"""Splits of a model's instances into roles: which one is best, and which single switches lead there.

Pure. Whether anything is switched at all is `control`'s decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xllm.service.roles.board import Phases, keeps_floors
from xllm.service.roles.outlook import Outlook, Split, Work, outlook
from xllm.service.router.base import InstanceView
from xllm.service.router.decode import running_tokens
from xllm.types import DECODE, MIXED, PREFILL

_TIE = 0.05
"""Splits whose worst shares differ by less are equally good."""
_CLEAR = 0.5
"""By how much all mixed may be predicted worse than the best before that one is aimed at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleView:
    """One instance that takes requests. `tpot_ms` is what was seen lately, None = it hardly spoke.

    `is_first_role`: it has the role that it came with; nothing has to cool down then.
    """

    load: InstanceView
    epoch: int = 0
    pinned: bool = False
    since_s: float = 0.0
    is_first_role: bool = True
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """`epoch` is the one that was decided upon; the board refuses it if the role has changed since."""

    instance: str
    phases: Phases
    epoch: int
    reason: str
    numbers: str


def split_of(views: Sequence[RoleView]) -> Split:
    roles = [v.load.phases for v in views]
    num_prefill, num_decode = roles.count(PREFILL), roles.count(DECODE)
    return Split(num_prefill, len(roles) - num_prefill - num_decode, num_decode)


def best_split(
    views: Sequence[RoleView], work: Work, ttft_ms: float, tpot_ms: float, now: Split
) -> tuple[Split, Outlook]:
    """The split with the smallest worst share; of equally good ones the nearest, then the most mixed.

    All mixed, unless another one is clearly better: it serves whatever comes and waits for nobody's switch,
    which a prediction for the demand of this moment does not see.
    """
    roles = [v.load.phases for v in views]
    fixed = split_of([v for v in views if v.pinned])
    found = [
        (outlook(split, work, ttft_ms, tpot_ms), split)
        for split in _splits(len(views))
        if split.num_prefill >= fixed.num_prefill
        and split.num_mixed >= fixed.num_mixed
        and split.num_decode >= fixed.num_decode
        and keeps_floors(roles, _roles(split))
    ]
    least = min(reached.worst for reached, _ in found)
    near = [(reached, split) for reached, split in found if reached.worst <= least * (1.0 + _TIE)]
    if all(split != now for _, split in near):
        mixed = [x for x in found if x[1].num_mixed == len(views) and x[0].worst <= least * (1.0 + _CLEAR)]
        near = mixed or near
    reached, split = min(near, key=lambda x: (_distance(now, x[1]), -x[1].num_mixed, x[0].worst, x[1]))
    return split, reached


def _splits(num: int) -> Iterator[Split]:
    for num_prefill in range(num):
        for num_decode in range(num - num_prefill + 1):
            split = Split(num_prefill, num - num_prefill - num_decode, num_decode)
            if split.num_mixed or (num_prefill and num_decode):
                yield split


def _roles(split: Split) -> list[Phases]:
    return [PREFILL] * split.num_prefill + [MIXED] * split.num_mixed + [DECODE] * split.num_decode


def _distance(a: Split, b: Split) -> int:
    return sum(
        abs(x - y)
        for x, y in (
            (a.num_prefill, b.num_prefill),
            (a.num_mixed, b.num_mixed),
            (a.num_decode, b.num_decode),
        )
    )


def steps_towards(
    views: Sequence[RoleView],
    free: Sequence[RoleView],
    now: Split,
    target: Split,
    danger: str,
    numbers: str,
) -> tuple[Switch, ...]:
    """One step in each direction, the urgent one first. To all mixed at once: nothing moves, nobody loses a
    phase, and what is only half mixed has the queues of one way and the long steps of the other."""
    if target.num_mixed == len(views):
        return tuple(
            Switch(instance=v.load.name, phases=MIXED, epoch=v.epoch, reason=danger, numbers=numbers)
            for v in free
            if v.load.phases != MIXED
        )
    more_prefill = ((DECODE, PREFILL), (DECODE, MIXED), (MIXED, PREFILL))
    more_decode = ((PREFILL, DECODE), (PREFILL, MIXED), (MIXED, DECODE))
    directions = (more_prefill, more_decode) if danger == "ttft" else (more_decode, more_prefill)
    roles = {v.load.name: v.load.phases for v in views}
    missing = {
        PREFILL: target.num_prefill - now.num_prefill,
        MIXED: target.num_mixed - now.num_mixed,
        DECODE: target.num_decode - now.num_decode,
    }
    switches = []
    for direction in directions:
        for source, sink in direction:
            chosen = _choose(free, roles, source) if missing[source] < 0 < missing[sink] else None
            after = {**roles, chosen.load.name: sink} if chosen is not None else roles
            if chosen is None or not keeps_floors(tuple(roles.values()), tuple(after.values())):
                continue
            roles = after
            missing[source] += 1
            missing[sink] -= 1
            switches.append(
                Switch(
                    instance=chosen.load.name,
                    phases=sink,
                    epoch=chosen.epoch,
                    reason=danger,
                    numbers=numbers,
                )
            )
            break
    return tuple(switches)


def _choose(free: Sequence[RoleView], roles: dict[str, Phases], source: Phases) -> RoleView | None:
    """Who has least to work off of what it loses; one that still has work of its former role comes first."""
    able = [v for v in free if roles[v.load.name] == source == v.load.phases]
    return min(able, key=lambda v: (not v.load.old_phases, num_tokens(v.load), v.load.name), default=None)


def num_tokens(load: InstanceView) -> int:
    return running_tokens(load) + max(load.backlog_tokens, load.engine.backlog_tokens)


def told(split: Split) -> str:
    return f"{split.num_prefill}p{split.num_mixed}m{split.num_decode}d"
