"""Page tables of sequences over the pools of all KV groups: grow, share, publish, trim, release.

Policy only (no torch, no I/O): decides which page holds which tokens. All-or-nothing calls: a
refusal leaves every table and pool as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.engine.kvtransfer.base import Slots
from xllm.engine.memory.leases import FREED, Leases
from xllm.engine.memory.news import PageNews
from xllm.engine.memory.pool import NameListener, PagePool, PoolCounts, PrefixKey
from xllm.engine.plan import PageCopy
from xllm.errors import InternalError
from xllm.prefix import page_digest
from xllm.types import PAGE_SIZE, KVGroup

__all__ = ["FREED", "PageManager", "PageTable", "pages_for"]


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


@dataclass(slots=True)
class PageTable:
    """One sequence's pages. Written only by PageManager, which clears `planned` whenever `pages` change.

    `pages[g][i]` covers positions [64·i, 64·i+64); all groups have the same length.
    `chain[i]` is the digest of page i for i < num_published; `root` is the chain's first parent.
    """

    root: bytes
    pages: list[list[int]]
    chain: list[bytes] = field(default_factory=list)
    planned: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_pages(self) -> int:
        return len(self.pages[0])

    def as_plan(self) -> tuple[tuple[int, ...], ...]:
        """`pages` as a value; made anew only after a change, since pages change once in 64 tokens."""
        if self.planned is None:
            self.planned = tuple(tuple(group) for group in self.pages)
        return self.planned


class PageManager:
    """Owns the pools. One per engine; called by the scheduler only."""

    def __init__(
        self, groups: Sequence[KVGroup], num_pages: Sequence[int], enable_prefix_caching: bool
    ) -> None:
        self._windows = [g.window for g in groups]
        self._limited = [(g, w) for g, w in enumerate(self._windows) if w is not None]
        self._caching = enable_prefix_caching
        # A prefix is as long as full attention has it; a window group keeps the end of one only.
        self._deciding = self._windows.index(None) if None in self._windows else 0
        self.news = PageNews() if enable_prefix_caching else None
        self._pools = [
            PagePool(n, self.news if g == self._deciding else None, g) for g, n in enumerate(num_pages)
        ]
        self.leases = Leases(self._pools, self._windows)

    @property
    def caching(self) -> bool:
        return self._caching

    def listen(self, listener: NameListener) -> None:
        """Tell of names from now on; those there are already are known."""
        for pool in self._pools:
            pool.listener = listener

    def adopt(self, group: int, pages: Sequence[tuple[int, PrefixKey]]) -> int:
        """As `PagePool.adopt`. Only with prefix caching."""
        return self._pools[group].adopt(pages)

    def new_table(self, root: bytes) -> PageTable:
        return PageTable(root=root, pages=[[] for _ in self._pools])

    def match(self, root: bytes, tokens: Sequence[int], max_tokens: int) -> PageTable:
        """A table that shares the longest cached prefix of `tokens`, at most `max_tokens` of it.

        Full groups need every page of the prefix, window groups only those the next row can see.
        """
        table = self.new_table(root)
        if not self._caching:
            return table
        keys = self._known_chain(root, tokens, max_tokens // PAGE_SIZE)
        while keys:
            pages = [self._cover(g, keys) for g in range(len(self._pools))]
            found = [p for p in pages if p is not None]
            if len(found) == len(pages):
                for pool, group in zip(self._pools, found, strict=True):
                    for page in group:
                        if page != FREED:
                            pool.share(page)
                table.pages = found
                table.planned = None
                table.chain = [k.digest for k in keys]
                return table
            keys.pop()
        return table

    def grow(self, table: PageTable, num_tokens: int) -> bool:
        """Make the table cover `num_tokens`; False (and nothing taken) if a pool cannot."""
        if num_tokens <= len(table.pages[0]) * PAGE_SIZE:
            return True
        if not self.can_grow(table, num_tokens):
            return False
        missing = pages_for(num_tokens) - table.num_pages
        table.planned = None
        for pool, group in zip(self._pools, table.pages, strict=True):
            group.extend(pool.allocate() for _ in range(missing))
        return True

    def can_grow(self, table: PageTable, num_tokens: int) -> bool:
        """Would `grow` succeed now?"""
        missing = pages_for(num_tokens) - table.num_pages
        return missing <= 0 or all(pool.num_available >= missing for pool in self._pools)

    def computed(self, table: PageTable, tokens: Sequence[int], num_computed: int) -> None:
        """After a step: name the pages that became full, give back what no later row can see."""
        if self._caching and num_computed >= (len(table.chain) + 1) * PAGE_SIZE:
            self._publish(table, tokens, num_computed // PAGE_SIZE)
        for g, window in self._limited:
            self._free_until(table, g, self._first_visible(window, num_computed))

    def fork(self, table: PageTable, num_tokens: int) -> tuple[PageTable, list[PageCopy]] | None:
        """A second table over the same `num_tokens`: full pages shared, the partial one copied.

        None if no page is left for the copy. Copies must run before the next step's rows.
        """
        num_full = num_tokens // PAGE_SIZE
        partial = num_tokens % PAGE_SIZE > 0
        if partial and any(pool.num_available < 1 for pool in self._pools):
            return None
        child = PageTable(root=table.root, pages=[], chain=table.chain[:num_full])
        copies: list[PageCopy] = []
        for g, pool in enumerate(self._pools):
            group = table.pages[g][:num_full]
            for page in group:
                if page != FREED:
                    pool.share(page)
            if partial:
                dst = pool.allocate()
                copies.append(PageCopy(group=g, src=table.pages[g][num_full], dst=dst))
                group.append(dst)
            child.pages.append(group)
        return child, copies

    def table_over(
        self, root: bytes, slots: Slots, pages: Sequence[Sequence[int]], num_tokens: int
    ) -> PageTable | None:
        """A table whose KV has arrived in leased `slots`, as `Leases.take`; None if the pages do not do."""
        taken = self.leases.take(slots, pages, num_tokens)
        return None if taken is None else PageTable(root=root, pages=taken)

    def cut(self, table: PageTable, num_pages: int) -> None:
        """Give back the pages behind the first `num_pages`."""
        table.planned = None
        for pool, group in zip(self._pools, table.pages, strict=True):
            for page in reversed(group[num_pages:]):
                if page != FREED:
                    pool.release(page)
            del group[num_pages:]
        del table.chain[num_pages:]

    def release(self, table: PageTable) -> None:
        """Give every page back, last page first; the table is empty afterwards."""
        table.planned = None
        for pool, group in zip(self._pools, table.pages, strict=True):
            for page in reversed(group):
                if page != FREED:
                    pool.release(page)
            group.clear()
        table.chain.clear()

    def fits(self, num_tokens: int, max_chunk: int) -> bool:
        """Can one sequence of `num_tokens` ever be computed when it has the pools to itself?"""
        need = pages_for(num_tokens)
        for pool, window in zip(self._pools, self._windows, strict=True):
            most = need if window is None else min(need, pages_for(window + max_chunk) + 2)
            if most > pool.num_pages:
                return False
        return True

    def is_owned(self, group: int, page: int) -> bool:
        """Is it in somebody's table?"""
        return self._pools[group].is_owned(page)

    def counts(self) -> PoolCounts:
        """Summed over groups."""
        per_pool = [pool.counts() for pool in self._pools]
        return PoolCounts(
            total=sum(c.total for c in per_pool),
            free=sum(c.free for c in per_pool),
            reusable=sum(c.reusable for c in per_pool),
            owned=sum(c.owned for c in per_pool),
            in_transfer=sum(c.in_transfer for c in per_pool),
        )

    def check_idle(self) -> None:
        """With no sequence alive no page may be owned. Raises InternalError."""
        for pool in self._pools:
            pool.check()
            if pool.counts().owned:
                raise InternalError("pages are owned while no sequence is alive")

    def check(self) -> None:
        for pool in self._pools:
            pool.check()

    def names(self) -> tuple[bytes, ...]:
        """Digests of the pages that `news` speaks of, as of now."""
        return self._pools[self._deciding].names()

    def reset_prefix_cache(self) -> int:
        return sum(pool.forget_all() for pool in self._pools)

    def _known_chain(self, root: bytes, tokens: Sequence[int], max_pages: int) -> list[PrefixKey]:
        """Keys of the leading pages as long as some group still has them (the cheapest bound)."""
        keys: list[PrefixKey] = []
        parent = root
        for i in range(max_pages):
            page_tokens = tuple(tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            key = PrefixKey(page_digest(parent, page_tokens), parent, page_tokens)
            if not self._anywhere(key):
                break
            keys.append(key)
            parent = key.digest
        return keys

    def _anywhere(self, key: PrefixKey) -> bool:
        full = [p for p, w in zip(self._pools, self._windows, strict=True) if w is None]
        # With a full group every page must be there; with window groups only, holes are legal.
        return all(p.find(key) is not None for p in full) if full else True

    def _cover(self, g: int, keys: list[PrefixKey]) -> list[int] | None:
        window = self._windows[g]
        first = 0 if window is None else self._first_visible(window, len(keys) * PAGE_SIZE)
        group: list[int] = [FREED] * first
        for key in keys[first:]:
            page = self._pools[g].find(key)
            if page is None:
                return None
            group.append(page)
        return group

    def _publish(self, table: PageTable, tokens: Sequence[int], num_full: int) -> None:
        for i in range(len(table.chain), num_full):
            parent = table.chain[i - 1] if i else table.root
            page_tokens = tuple(tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            key = PrefixKey(page_digest(parent, page_tokens), parent, page_tokens)
            table.chain.append(key.digest)
            for pool, group in zip(self._pools, table.pages, strict=True):
                if group[i] != FREED:
                    pool.publish(group[i], key)

    @staticmethod
    def _first_visible(window: int, next_position: int) -> int:
        """Index of the first page that the row at `next_position` (or any later one) can see."""
        return max(0, next_position - window + 1) // PAGE_SIZE

    def _free_until(self, table: PageTable, g: int, first: int) -> None:
        group = table.pages[g]
        # Freed entries form a prefix, so walking back from `first` touches each page once.
        for i in range(min(first, len(group)) - 1, -1, -1):
            if group[i] == FREED:
                break
            table.planned = None
            self._pools[g].release(group[i])
            group[i] = FREED
