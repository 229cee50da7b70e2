"""The pool of one KV group's physical pages and the cache of those that hold a known prefix.

State machine of a page: free → owned (refcount ≥ 1) → reusable (refcount 0, content named) → owned
again by a prefix hit, or free by eviction. A page that a transfer holds is given to nobody, owned or not,
until the transfer lets go of it. Policy only: what a page *is* belongs to the platform.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from xllm.engine.memory.news import PageNews
from xllm.errors import InternalError


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """What a full page holds; `parent` and `tokens` are compared on every hit."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Pages by state; they always add up to `total`. `in_transfer`: held by a transfer, owned by nobody."""

    total: int
    free: int
    reusable: int
    owned: int
    in_transfer: int = 0


class NameListener(Protocol):
    """Hears of every name: a page that has one is complete, and nobody writes it until it is gone again."""

    def named(self, group: int, page: int, key: PrefixKey) -> None: ...

    def unnamed(self, group: int, page: int) -> None: ...

    def all_unnamed(self, group: int) -> None: ...


class PagePool:
    """Single owner of page states in one group. Not thread-safe: the step thread owns it.

    `news`, where somebody wants to know, hears of every name that appears or vanishes; so does `listener`,
    which is told the page as well.
    """

    def __init__(self, num_pages: int, news: PageNews | None = None, group: int = 0) -> None:
        self._news = news
        self._group = group
        self.listener: NameListener | None = None
        self._free = deque(range(num_pages))
        self._refs = [0] * num_pages
        # Kept beside the reference counts so that a snapshot costs nothing; `check` compares them.
        self._num_owned = 0
        self._holds: dict[int, int] = {}
        self._num_in_transfer = 0
        self._keys: list[PrefixKey | None] = [None] * num_pages
        self._by_digest: dict[bytes, int] = {}
        # Least recently released first. Tables release tail pages first, so the tail of a prefix
        # is evicted before its head: a head without its tail is still a hit.
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + len(self._reusable)

    @property
    def num_pages(self) -> int:
        return len(self._refs)

    def allocate(self) -> int:
        """A page with refcount 1 and no name; evicts the oldest reusable page if none is free.

        The caller has checked `num_available`.
        """
        page = self._take()
        self._refs[page] = 1
        self._num_owned += 1
        return page

    def lease(self) -> int:
        """A page as from `allocate`, but held by a transfer that will write it, and owned by nobody."""
        page = self._take()
        self._holds[page] = 1
        self._num_in_transfer += 1
        return page

    def hold(self, page: int) -> None:
        """A transfer reads this owned, reusable or held page: its content stays until `let_go`."""
        if self._refs[page] == 0 and page not in self._holds:
            if page not in self._reusable:
                raise InternalError("a free page was to be held")
            del self._reusable[page]
            self._num_in_transfer += 1
        self._holds[page] = self._holds.get(page, 0) + 1

    def let_go(self, page: int) -> None:
        """One transfer less; the last one gives back a page that nobody owns."""
        left = self._holds.get(page, 0) - 1
        if left < 0:
            raise InternalError("a page was let go of that no transfer holds")
        if left:
            self._holds[page] = left
            return
        del self._holds[page]
        if self._refs[page] == 0:
            self._num_in_transfer -= 1
            self._put_back(page)

    def is_owned(self, page: int) -> bool:
        return self._refs[page] > 0

    def is_shared(self, page: int) -> bool:
        """Does it have several owners?"""
        return self._refs[page] > 1

    def share(self, page: int) -> None:
        """One more owner of an owned, reusable or held page."""
        if self._refs[page] == 0:
            if page in self._holds:
                self._num_in_transfer -= 1
            elif page in self._reusable:
                del self._reusable[page]
            else:
                raise InternalError("a free page was shared")
            self._num_owned += 1
        self._refs[page] += 1

    def release(self, page: int) -> None:
        """One owner less; at zero the page is reusable if it has a name, else free."""
        if self._refs[page] <= 0:
            raise InternalError("a page was released more often than it was owned")
        self._refs[page] -= 1
        if self._refs[page] == 0:
            self._num_owned -= 1
            if page in self._holds:
                self._num_in_transfer += 1
            else:
                self._put_back(page)

    def publish(self, page: int, key: PrefixKey) -> None:
        """Name a full, computed page. The first page of a digest keeps the name."""
        if key.digest not in self._by_digest and self._keys[page] is None:
            self._by_digest[key.digest] = page
            self._keys[page] = key
            if self._news is not None:
                self._news.stored(key.digest)
            if self.listener is not None:
                self.listener.named(self._group, page, key)

    def adopt(self, pages: Sequence[tuple[int, PrefixKey]]) -> int:
        """Free pages hold these names from before: they become reusable, the first to be evicted first.

        The number taken; a name that is known already is left out.
        """
        free = set(self._free)
        taken: set[int] = set()
        for page, key in pages:
            if page not in free or page in taken:
                raise InternalError("a page was adopted that is not free")
            if key.digest not in self._by_digest:
                taken.add(page)
                self._by_digest[key.digest] = page
                self._keys[page] = key
                self._reusable[page] = None
        self._free = deque(page for page in self._free if page not in taken)
        if taken and self._news is not None:
            self._news.start_over()
        return len(taken)

    def find(self, key: PrefixKey) -> int | None:
        """The page that holds exactly `key`, else None; takes no ownership."""
        page = self._by_digest.get(key.digest)
        return page if page is not None and self._keys[page] == key else None

    def forget_all(self) -> int:
        """Drop every reusable page and every name; the number of pages freed."""
        num_freed = len(self._reusable)
        self._free.extend(self._reusable)
        self._reusable.clear()
        self._by_digest.clear()
        self._keys = [None] * len(self._refs)
        if self.listener is not None:
            self.listener.all_unnamed(self._group)
        if self._news is not None:
            self._news.start_over()
        return num_freed

    def key_of(self, digest: bytes) -> tuple[int, PrefixKey] | None:
        """The page of that name and what it holds; for peers, which know digests only."""
        page = self._by_digest.get(digest)
        key = None if page is None else self._keys[page]
        return None if page is None or key is None else (page, key)

    def names(self) -> tuple[bytes, ...]:
        """Digests of all pages that a prefix may hit now."""
        return tuple(self._by_digest)

    def counts(self) -> PoolCounts:
        return PoolCounts(
            total=len(self._refs),
            free=len(self._free),
            reusable=len(self._reusable),
            owned=self._num_owned,
            in_transfer=self._num_in_transfer,
        )

    def check(self) -> None:
        """Raise InternalError unless every page is in one state and no name is dangling."""
        c = self.counts()
        if c.free + c.reusable + c.owned + c.in_transfer != c.total:
            raise InternalError("pages are not conserved")
        if c.owned != sum(1 for r in self._refs if r > 0):
            raise InternalError("the count of owned pages is wrong")
        if c.in_transfer != sum(1 for p in self._holds if self._refs[p] == 0):
            raise InternalError("the count of pages in transfer is wrong")
        if any(self._keys[p] is None or self._keys[p].digest != d for d, p in self._by_digest.items()):  # type: ignore[union-attr]
            raise InternalError("a prefix name points to a page that does not hold it")

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        page, _ = self._reusable.popitem(last=False)
        self._forget(page)
        return page

    def _put_back(self, page: int) -> None:
        if self._keys[page] is None:
            # To the front: what was in use a moment ago is backed by memory, and warm in the caches.
            self._free.appendleft(page)
        else:
            self._reusable[page] = None

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._by_digest[key.digest]
            self._keys[page] = None
            if self.listener is not None:
                self.listener.unnamed(self._group, page)
            if self._news is not None:
                self._news.removed(key.digest)
