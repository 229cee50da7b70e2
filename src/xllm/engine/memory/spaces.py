"""Spaces: address ranges in which a sequence's pages stand in order, and which of them goes to whom.

A space outlives its sequences. What was mapped in it stays mapped, and the next sequence is given the pages
that stand there already, as far as they may be taken: then nothing is mapped at all. Policy only. How pages
are mapped, and whether that is done yet, is the mapper's; a step reads through a space only when it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from xllm.engine.memory.pool import PagePool
from xllm.engine.plan import NO_SPACE
from xllm.errors import InternalError

UNMAPPED = -1
_CANDIDATES = 16
"""So many of the spaces that have been idle longest are compared: further ones hold younger pages."""
_PER_SPACE = 2
"""Mappings of a space beside those of its pages: what is not mapped before and behind them."""


@dataclass(frozen=True, slots=True)
class MapCounters:
    """Parts of steps, one for each sequence in one: `num_read` went through a space, `num_late` through the
    page table since something was not mapped yet; `num_late_decodes` of these had one row."""

    num_maps: int = 0
    num_failed: int = 0
    num_read: int = 0
    num_late: int = 0
    num_late_decodes: int = 0


class Mapper(Protocol):
    """Maps in its own time; newer orders for an entry replace older ones. Never fails: what cannot be mapped
    is not there, and its sequence is read through its page table."""

    @property
    def num_spaces(self) -> int: ...

    @property
    def space_pages(self) -> int:
        """Pages of a space in each group."""

    @property
    def max_mappings(self) -> int: ...

    @property
    def counters(self) -> MapCounters: ...

    def map(self, space: int, group: int, index: int, page: int) -> None:
        """Let `page` be the space's `index`-th one. Nobody reads that entry now, unless it is so already."""

    def unmap(self, space: int) -> None:
        """Of a space that nobody reads."""


@dataclass(slots=True)
class SpaceCounters:
    num_kept: int = 0
    """Pages that a sequence came to and that stood in its space already."""
    num_placed: int = 0
    """Pages that had to be mapped for a sequence."""
    num_unmaps: int = 0
    """Spaces unmapped to stay below the limit."""


class Spaces:
    """Who has which space, and what stands in it once the mapper has done what it was told.

    Owned by the page manager. Entries of a space in use change only behind its table's last page: what a step
    under way may read stays as it is.
    """

    def __init__(self, mapper: Mapper, pools: Sequence[PagePool]) -> None:
        self.mapper = mapper
        self._pools = pools
        self._entries: dict[int, list[list[int]]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Longest idle first. Those never used are none of these: their number is `_num_used` and beyond."""
        self._num_used = 0
        self._num_entries = 0
        self._promised: dict[int, dict[tuple[int, int], int]] = {}
        """By space: (group, index) → the page that its table will be given there."""
        self._homes: list[dict[int, set[int]]] = [{} for _ in pools]
        """By group: the spaces in which a page stands."""
        self._homeless = [dict.fromkeys(range(pool.num_pages)) for pool in pools]
        self.counters = SpaceCounters()

    @property
    def num_mappings(self) -> int:
        """At most; neighbours in the file that are neighbours in a space are one in fact."""
        return self._num_entries + len(self._pools) * (1 + _PER_SPACE * self._num_used)

    @property
    def num_in_use(self) -> int:
        return self._num_used - len(self._idle)

    def take(self, pages: Sequence[Sequence[int]], num_pages: int) -> int:
        """A space for a table that has `pages` and shall have `num_pages` soon; NO_SPACE if there is none.

        Whichever idle one asks for fewest mappings; of equals the one that has been idle longest.
        """
        if num_pages > self.mapper.space_pages:
            return NO_SPACE
        best, most = NO_SPACE, -1
        for space in self._candidates(pages[0]):
            fitting = self._fitting(space, pages, num_pages)
            if fitting > most:
                best, most = space, fitting
        if most < len(pages) * num_pages // 2 and len(self._homeless[0]) >= num_pages:
            # What is evicted for the rest stands nowhere: a further space leaves the others as they are.
            best = self._fresh(best)
        if best == NO_SPACE:
            best = self._fresh(best)
        if best != NO_SPACE:
            self._idle.pop(best, None)
            for g, group in enumerate(pages):
                for index, page in enumerate(group):
                    self.place(best, g, index, page)
        return best

    def give_back(self, space: int) -> None:
        """Its table has ended. What stands in it stays."""
        self._break_promises(space)
        self._idle[space] = None

    def wanted(self, space: int, group: int, index: int) -> int:
        """The page that stands there, if a table may be given it; else UNMAPPED."""
        entries = self._entries[space][group]
        page = entries[index] if index < len(entries) else UNMAPPED
        if page == UNMAPPED:
            return UNMAPPED
        if self._promised.get(space, {}).get((group, index)) == page:
            return page if self._pools[group].is_available(page) else UNMAPPED
        # Free pages that are none: the partial page at the end of each idle space waits for its successor.
        return page if self._pools[group].may_prefer(page, spare=len(self._idle)) else UNMAPPED

    def choose(self, space: int, group: int, index: int) -> int:
        """The page a table is to be given there: the one that stands there, else one that stands nowhere, so
        that nobody finds his own one taken; negative: whichever the pool likes."""
        page = self.wanted(space, group, index)
        return page if page != UNMAPPED else self._nowhere(group)

    def place(self, space: int, group: int, index: int, page: int) -> None:
        """The table has `page` at `index`; a negative one was given back and is never read."""
        if page < 0:
            return
        promised = self._promised.get(space, {}).pop((group, index), None)
        if promised is not None:
            self._pools[group].break_promise(promised)
        if promised == page:
            pass  # counted when it was promised
        elif self._at(space, group, index) == page:
            self.counters.num_kept += 1
        else:
            self.counters.num_placed += 1
        self._map(space, group, index, page)

    def expect(self, space: int, first: int, end: int) -> None:
        """The table will soon have pages at first … end − 1: have mapped what it will be given."""
        for index in range(first, min(end, self.mapper.space_pages)):
            for g, pool in enumerate(self._pools):
                if self.wanted(space, g, index) != UNMAPPED:
                    continue
                page = pool.promise(self._nowhere(g))
                if page is not None:
                    self.counters.num_placed += 1
                    broken = self._promised.setdefault(space, {}).pop((g, index), None)
                    if broken is not None:
                        pool.break_promise(broken)
                    self._promised[space][g, index] = page
                    self._map(space, g, index, page)

    def is_there(self, space: int, pages: Sequence[Sequence[int]]) -> bool:
        """Does the space hold these pages, as far as they were not given back? For checks."""
        return all(
            page < 0 or self._at(space, g, i) in (page, UNMAPPED)
            for g, group in enumerate(pages)
            for i, page in enumerate(group)
        )

    def check(self) -> None:
        """Raise InternalError unless the counts are those of the entries."""
        entries = [page for groups in self._entries.values() for group in groups for page in group]
        if self._num_entries != len(entries) - entries.count(UNMAPPED):
            raise InternalError("mappings are not conserved")
        for g, homes in enumerate(self._homes):
            for space, groups in self._entries.items():
                if any(page != UNMAPPED and space not in homes[page] for page in groups[g]):
                    raise InternalError("a page stands in a space that is none of its homes")
            if any(homes.get(page) for page in self._homeless[g]):
                raise InternalError("a page that has a home counts as homeless")

    def _candidates(self, hits: Sequence[int]) -> list[int]:
        """Idle spaces worth a look: that hold the end of the prefix that was hit, and the longest idle."""
        found: dict[int, None] = {}
        for index in range(len(hits) - 1, -1, -1):
            for space in self._homes[0].get(hits[index], ()):
                if space in self._idle and self._at(space, 0, index) == hits[index]:
                    found[space] = None
            if found:
                break
        # The order of a set is not one that anybody should depend on.
        ranked = sorted(found)[:_CANDIDATES]
        for space in self._idle:
            if len(ranked) >= 2 * _CANDIDATES:
                break
            if space not in found:
                ranked.append(space)
        return ranked

    def _fitting(self, space: int, pages: Sequence[Sequence[int]], num_pages: int) -> int:
        """How many pages of such a table would be there already."""
        count = 0
        for g, group in enumerate(pages):
            count += sum(self._at(space, g, i) == page for i, page in enumerate(group))
            count += sum(self.wanted(space, g, i) != UNMAPPED for i in range(len(group), num_pages))
        return count

    def _fresh(self, otherwise: int) -> int:
        """One never used, if there is one."""
        if self._num_used < self.mapper.num_spaces:
            space = self._num_used
            self._num_used += 1
            self._entries[space] = [[] for _ in self._pools]
            return space
        return otherwise

    def _at(self, space: int, group: int, index: int) -> int:
        entries = self._entries[space][group]
        return entries[index] if index < len(entries) else UNMAPPED

    def _map(self, space: int, group: int, index: int, page: int) -> None:
        before, entries = self._at(space, group, index), self._entries[space][group]
        if before == page or index >= self.mapper.space_pages or (before == UNMAPPED and not self._room()):
            return
        entries.extend([UNMAPPED] * (index + 1 - len(entries)))
        if before == UNMAPPED:
            self._num_entries += 1
        else:
            self._leave(space, group, before)
        entries[index] = page
        self._homes[group].setdefault(page, set()).add(space)
        self._homeless[group].pop(page, None)
        self.mapper.map(space, group, index, page)

    def _leave(self, space: int, group: int, page: int) -> None:
        """The page stands in this space no more, but perhaps in another one."""
        if self._entries[space][group].count(page) == 1:
            homes = self._homes[group][page]
            homes.discard(space)
            if not homes:
                self._homeless[group][page] = None

    def _nowhere(self, group: int) -> int:
        pool, spare = self._pools[group], len(self._idle)
        few = islice(self._homeless[group], _CANDIDATES)
        return next((page for page in few if pool.may_prefer(page, spare)), UNMAPPED)

    def _room(self) -> bool:
        """Is one more mapping allowed? Makes room by unmapping what has been idle longest."""
        while self.num_mappings >= self.mapper.max_mappings:
            space = next((s for s in self._idle if any(self._entries[s])), NO_SPACE)
            if space == NO_SPACE:
                return False
            for g, group in enumerate(self._entries[space]):
                for page in set(group) - {UNMAPPED}:
                    homes = self._homes[g][page]
                    homes.discard(space)
                    if not homes:
                        self._homeless[g][page] = None
            self._num_entries -= sum(len(group) - group.count(UNMAPPED) for group in self._entries[space])
            self._entries[space] = [[] for _ in self._pools]
            self.counters.num_unmaps += 1
            self.mapper.unmap(space)
        return True

    def _break_promises(self, space: int) -> None:
        for (g, _), page in self._promised.pop(space, {}).items():
            self._pools[g].break_promise(page)
