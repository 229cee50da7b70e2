"""What stands in which space, as far as it is mapped, and whether a step may read through it.

Shared by all who map: a space is read only if it holds the very pages of the sequence's table, whatever was
ordered. So a mapping that is late or refused costs a look into the table, never a wrong byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.engine.memory.spaces import UNMAPPED, MapCounters
from xllm.engine.plan import NO_SPACE, SequencePlan


class SpaceTable:
    """Asked by the step thread. Who maps changes single entries, and those only that no step reads."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._there: dict[int, list[list[int]]] = {}
        """By space and group: the page that is mapped at each index. What is being mapped is not there."""
        self._seen: dict[int, object] = {}
        self._num_maps = self._num_failed = self._num_read = self._num_late = self._num_late_decodes = 0

    @property
    def counters(self) -> MapCounters:
        return MapCounters(
            num_maps=self._num_maps,
            num_failed=self._num_failed,
            num_read=self._num_read,
            num_late=self._num_late,
            num_late_decodes=self._num_late_decodes,
        )

    def space_of(self, entry: SequencePlan) -> int:
        """The entry's space if all its pages are there, else NO_SPACE."""
        space = entry.space
        if space == NO_SPACE:
            return NO_SPACE
        # A plan's pages are the same object until they change, which is once in 64 tokens.
        if self._seen.get(space) is not entry.pages:
            if not self._holds(space, entry.pages):
                self._num_late += 1
                self._num_late_decodes += len(entry.tokens) == 1
                return NO_SPACE
            self._seen[space] = entry.pages
        self._num_read += 1
        return space

    def entries(self, space: int, group: int) -> list[int]:
        return self._there.setdefault(space, [[] for _ in range(self._num_groups)])[group]

    def entry(self, space: int, group: int, index: int) -> list[int]:
        """The list that has room for `index`."""
        there = self.entries(space, group)
        if index >= len(there):
            there.extend([UNMAPPED] * (index + 1 - len(there)))
        return there

    def empty(self, space: int) -> list[list[int]]:
        """Nothing is there any more; what was."""
        self._seen.pop(space, None)
        return self._there.pop(space, [])

    def _holds(self, space: int, pages: Sequence[Sequence[int]]) -> bool:
        groups = self._there.get(space)
        if groups is None:
            return False
        for there, group in zip(groups, pages, strict=True):
            # Pages that were given back are the first ones, and are not read.
            freed = group.count(-1)
            if tuple(there[freed : len(group)]) != tuple(group[freed:]):
                return False
        return True
