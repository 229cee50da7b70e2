"""One move out: which of a request's pages are on the sender's list, and what its manifest says. Pure.

A page enters the list once, when its content is settled, and is pinned from then on: a list index never
means two contents.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from xllm.engine.kvtransfer.base import ChoiceState, Manifest, Pushed
from xllm.engine.memory.leases import FREED, Leases
from xllm.engine.memory.manager import PageTable, pages_for
from xllm.engine.request import Request, Sequence, SequenceState
from xllm.types import PAGE_SIZE

GROWTH_LEN = PAGE_SIZE
"""Tokens that a sequence may draw while it is copied; a transfer that takes longer is given up."""


class Phase(enum.Enum):
    WAITING = "waiting"
    """Its size is not known yet: a sequence has no pages."""
    COPYING = "copying"
    """What is complete is sent while the sequences go on."""
    FINISHING = "finishing"
    """They hold still, the rest is on its way."""
    KEPT = "kept"
    """They hold still until the receiver asks (pull)."""
    DONE = "done"
    """Everything arrived. They hold until the front ends the attempt or takes the move back."""
    FAILED = "failed"
    """Over; pages stay pinned until the transfers let go."""


@dataclass(slots=True)
class Outgoing:
    """Written by `Sender` only. `drawn` are output lengths at the start, by sequence."""

    owner: int
    attempt: int
    transfer_id: str
    endpoints: tuple[str, ...]
    pull: bool
    request: Request
    drawn: dict[int, int]
    phase: Phase = Phase.WAITING
    limits: tuple[int, ...] = ()
    pinned: list[dict[int, int]] = field(default_factory=list)
    """By group: page → index in the list."""
    num_listed: dict[int, int] = field(default_factory=dict)
    """By sequence: leading pages that are listed, or need not be."""
    tables: dict[int, PageTable] = field(default_factory=dict)
    pushed_in_step: bool = False
    manifest: Manifest | None = None
    released: bool = False
    answered: bool = False
    expires_s: float = 0.0

    @property
    def live(self) -> list[Sequence]:
        return [s for s in self.request.sequences if s.state is not SequenceState.ENDED]

    def lost_pages(self) -> bool:
        """Has a sequence been preempted since it was seen with pages?"""
        for seq in self.live:
            if seq.table is not None:
                if self.tables.setdefault(seq.seq_id, seq.table) is not seq.table:
                    return True
            elif seq.seq_id in self.tables:
                return True
        return False

    def is_ready(self) -> bool:
        """Every sequence has drawn since the start, or cannot for want of credit, and needs one row next."""
        return all(
            seq.table is not None
            and seq.behind == 1
            and seq.num_output > 0
            and (seq.held or seq.out_of_credit or seq.num_output > self.drawn.get(seq.seq_id, 0))
            for seq in self.live
        )


def size_of(move: Outgoing, leases: Leases) -> tuple[int, ...] | None:
    """At most how many pages of each group it will take; None while that is not known."""
    live = move.live
    if len(live) > 1 and any(seq.table is None for seq in live):
        return None  # which pages they will share is not known
    sizes: list[int] = []
    for g in range(leases.num_groups):
        there: set[int] = set()
        more = 0
        for seq in live:
            first = leases.first_visible(g, len(seq.tokens) - 1)
            group = [] if seq.table is None else seq.table.pages[g][first:]
            there.update(page for page in group if page != FREED)
            more += max(0, pages_for(len(seq.tokens) + GROWTH_LEN) - first - len(group))
            more += 2 * (len(seq.draws) - 1)  # of a choice to be forked: the copied page, and its growth
        sizes.append(len(there) + more)
    return tuple(sizes)


def list_pages(
    move: Outgoing, leases: Leases, ends: Iterable[tuple[Sequence, int]], after_layer: bool = False
) -> Pushed | None:
    """Put the pages of each sequence up to its `end`-th on the list, and pin them.

    What is listed already, or lies before the group's window, is left out; None if there is nothing new.
    Raises OverflowError where the receiver leased fewer pages.
    """
    indices: list[list[int]] = [[] for _ in move.pinned]
    pages: list[list[int]] = [[] for _ in move.pinned]
    for seq, end in ends:
        if seq.table is None:
            continue
        start = move.num_listed.get(seq.seq_id, 0)
        for g, known in enumerate(move.pinned):
            first = max(start, leases.first_visible(g, len(seq.tokens) - 1))
            for page in seq.table.pages[g][first:end]:
                if page == FREED or page in known:
                    continue
                if len(known) >= move.limits[g]:
                    raise OverflowError
                leases.pin(g, page)
                known[page] = len(known)
                indices[g].append(known[page])
                pages[g].append(page)
        move.num_listed[seq.seq_id] = max(start, end)
    if not any(pages):
        return None
    return Pushed(
        indices=tuple(tuple(i) for i in indices),
        pages=tuple(tuple(p) for p in pages),
        after_layer=after_layer,
    )


def manifest_of(move: Outgoing) -> Manifest:
    """The sequences as they stand; all their pages are listed."""
    choices: list[ChoiceState] = []
    for seq in move.live:
        count = pages_for(seq.num_computed)
        groups = [] if seq.table is None else seq.table.pages
        choices.append(
            ChoiceState(
                choice=seq.choice,
                tokens=tuple(seq.tokens),
                num_computed=seq.num_computed,
                pages=tuple(
                    tuple(known.get(page, FREED) for page in group[:count])
                    for known, group in zip(move.pinned, groups, strict=True)
                ),
            )
        )
    return Manifest(num_prompt=len(move.request.prompt), choices=tuple(choices))
