"""Spaces of the null device: lists of page numbers that its runner reads and writes through.

Orders are carried out between steps, as many as `pace` says: a mapping that is wrong or left over changes
the tokens. What must not live here: who gets which space or page.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm.engine.kernels.spaces import SpaceTable
from xllm.engine.plan import NO_SPACE, SequencePlan

Pages = tuple[tuple[int, ...], ...]


class NullMapper(SpaceTable):
    """Implements `memory.spaces.Mapper`."""

    def __init__(
        self,
        num_groups: int,
        num_spaces: int,
        space_pages: int,
        max_mappings: int = 32_000,
        pace: Callable[[], int] | None = None,
    ) -> None:
        """`pace`: orders that are carried out before the next step; None = all."""
        super().__init__(num_groups)
        self.num_spaces = num_spaces
        self.space_pages = space_pages
        self.max_mappings = max_mappings
        self._pace = pace
        self._orders: dict[tuple[int, int, int], int] = {}

    def map(self, space: int, group: int, index: int, page: int) -> None:
        if self.entry(space, group, index)[index] == page:
            self._orders.pop((space, group, index), None)
        else:
            self._orders[space, group, index] = page

    def unmap(self, space: int) -> None:
        self.empty(space)
        self._orders = {key: page for key, page in self._orders.items() if key[0] != space}

    def work(self) -> None:
        """Between two steps."""
        left = len(self._orders) if self._pace is None else self._pace()
        for space, group, index in list(self._orders)[:left]:
            self.entry(space, group, index)[index] = self._orders.pop((space, group, index))
            self._num_maps += 1

    def pages_of(self, entry: SequencePlan) -> Pages:
        """The pages that stand in the entry's space, if it may be read; else those of its table."""
        space = self.space_of(entry)
        if space == NO_SPACE:
            return entry.pages
        return tuple(
            tuple(
                -1 if page < 0 else there for page, there in zip(group, self.entries(space, g), strict=False)
            )
            for g, group in enumerate(entry.pages)
        )
