"""Pages on their way between engines: leased for what comes in, pinned for what goes out, made into tables.

Policy only, over the pools of the page manager. When bytes have moved, and who may let go, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xllm.engine.kvtransfer.base import Slots
from xllm.engine.memory.pool import PagePool, PrefixKey
from xllm.prefix import page_digest
from xllm.types import PAGE_SIZE

FREED = -1
"""In a table: the page was given back because no later row can see it (sliding window)."""


class Leases:
    """The page manager's part for transfers. Refusals take nothing."""

    def __init__(self, pools: Sequence[PagePool], windows: Sequence[int | None]) -> None:
        self._pools = pools
        self._windows = windows

    @property
    def num_groups(self) -> int:
        return len(self._pools)

    def first_visible(self, g: int, next_position: int) -> int:
        """Index of the first page that the row at `next_position`, or any later one, can see in group g."""
        window = self._windows[g]
        return 0 if window is None else max(0, next_position - window + 1) // PAGE_SIZE

    def lease(self, num_pages: Sequence[int], spare: int) -> Slots | None:
        """So many pages of each group, for a transfer to write; None if fewer than `spare` would be left."""
        if len(num_pages) != len(self._pools):
            return None
        if any(
            n < 0 or pool.num_available < n + spare for pool, n in zip(self._pools, num_pages, strict=True)
        ):
            return None
        return tuple(
            tuple([pool.lease() for _ in range(n)]) for pool, n in zip(self._pools, num_pages, strict=True)
        )

    def pin(self, g: int, page: int) -> None:
        """A transfer reads the page: until `let_go` nobody else is given it."""
        self._pools[g].hold(page)

    def let_go(self, pages: Sequence[Iterable[int]]) -> None:
        """Of leased or pinned pages by group: the transfer touches them no more."""
        for pool, group in zip(self._pools, pages, strict=True):
            for page in group:
                pool.let_go(page)

    def take(self, slots: Slots, pages: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]] | None:
        """The pages of a table over `num_tokens` whose KV lies in `slots`; they are shared, not let go of.

        `pages[g][i]` are indices into `slots[g]`, FREED where there is none, and come from a peer. None
        unless they name each visible page once.
        """
        count = -(-num_tokens // PAGE_SIZE)
        if len(pages) != len(self._pools):
            return None
        table: list[list[int]] = []
        for g, group in enumerate(pages):
            first = self.first_visible(g, num_tokens)
            indices = list(group[first:count])
            if len(indices) != max(0, count - first) or len(set(indices)) != len(indices):
                return None
            if any(not 0 <= i < len(slots[g]) for i in indices):
                return None
            table.append([FREED] * min(first, count) + [slots[g][i] for i in indices])
        for pool, taken in zip(self._pools, table, strict=True):
            for page in taken:
                if page != FREED:
                    pool.share(page)
        return table

    def covers(self, table: Sequence[Sequence[int]], next_position: int) -> bool:
        """Has the table every page before `next_position` that its row can see?"""
        return all(
            FREED not in group[self.first_visible(g, next_position) : next_position // PAGE_SIZE]
            for g, group in enumerate(table)
        )

    def is_shared(self, table: Sequence[Sequence[int]], index: int) -> bool:
        """Do others own the table's `index`-th page in some group?"""
        return any(
            group[index] != FREED and pool.is_shared(group[index])
            for pool, group in zip(self._pools, table, strict=True)
        )

    def cached(self, root: bytes, digests: Sequence[bytes]) -> tuple[Slots, list[PrefixKey]]:
        """Pages and keys of the longest chain behind `root` that is cached with all that its last row's
        successor needs; a window group's pages begin later and end with it."""
        chain: list[tuple[PrefixKey, list[int | None]]] = []
        parent = root
        for digest in digests:
            found = [pool.key_of(digest) for pool in self._pools]
            keys = [entry[1] for entry in found if entry is not None]
            if not keys or any(key.parent != parent or key != keys[0] for key in keys):
                break
            chain.append((keys[0], [None if entry is None else entry[0] for entry in found]))
            parent = digest
        while chain:
            pages = [self._ending(g, [places[g] for _, places in chain]) for g in range(len(self._pools))]
            whole = [group for group in pages if group is not None]
            if len(whole) == len(pages):
                return tuple(whole), [key for key, _ in chain]
            chain.pop()
        return (), []

    def publish(self, slots: Slots, keys: Sequence[PrefixKey]) -> None:
        """Name leased pages that have arrived; each group's slots end with the last key. Once let go of
        they are reusable."""
        for pool, group in zip(self._pools, slots, strict=True):
            if group:
                for page, key in zip(group, keys[-len(group) :], strict=True):
                    pool.publish(page, key)

    def _ending(self, g: int, places: list[int | None]) -> tuple[int, ...] | None:
        """The pages of group g that a row behind these places needs; None if one is missing.

        A chain may begin anywhere, so a window is counted from its end.
        """
        window = self._windows[g]
        need = len(places) if window is None else min(len(places), -(-(window - 1) // PAGE_SIZE))
        group = places[len(places) - need :]
        pages = tuple(page for page in group if page is not None)
        return pages if len(pages) == len(group) else None


def chain_keys(root: bytes, tokens: Sequence[int]) -> list[PrefixKey]:
    """Names of the full pages of `tokens` behind `root`."""
    keys: list[PrefixKey] = []
    parent = root
    for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        page_tokens = tuple(tokens[start : start + PAGE_SIZE])
        keys.append(PrefixKey(page_digest(parent, page_tokens), parent, page_tokens))
        parent = keys[-1].digest
    return keys
