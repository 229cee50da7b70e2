"""Taking over the pages that an earlier engine of the same numerics class left.

Nothing is believed unread: of each header its checksum, its place and its name, of each page its content.
What fails is emptied and counted; it is computed anew when it is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from xllm.engine.memory.manager import PageManager
from xllm.engine.memory.pool import PrefixKey
from xllm.engine.surviving.headers import (
    EMPTY,
    clear_page_header,
    content_digest,
    read_page_header,
)
from xllm.engine.surviving.keeper import Keeper
from xllm.engine.surviving.memory import SharedGroup, SharedPages


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of the pages with a header."""

    num_taken: int
    num_refused: int
    elapsed_ms: float

    def line(self) -> str:
        """For the report at start-up."""
        return (
            f"surviving pages: {self.num_taken} taken over, {self.num_refused} refused, "
            f"checked in {self.elapsed_ms:.0f} ms"
        )


def adopt(
    shared: SharedPages, memory: PageManager, numerics_class: str, layout_digest: str
) -> tuple[Keeper, Adopted]:
    """Make whole pages of this class reusable in `memory`, and keep their headers from now on."""
    started_s = time.perf_counter()
    num_taken = num_refused = last_stamp = 0
    if not shared.bind(numerics_class, layout_digest) or not memory.caching:
        # Nobody will name these pages, so nobody would empty their headers either.
        shared.clear()
    else:
        for g, group in enumerate(shared.groups):
            whole, refused = _whole_pages(g, group)
            num_refused += refused
            num_taken += memory.adopt(g, [(page, key) for _, page, key in in_order_of_use(whole)])
            last_stamp = max(last_stamp, *(stamp + 1 for stamp, _, _ in whole), 0)
    keeper = Keeper(shared, last_stamp)
    memory.listen(keeper)
    return keeper, Adopted(num_taken, num_refused, (time.perf_counter() - started_s) * 1000)


Found = tuple[int, int, PrefixKey]
"""(stamp, page, key)."""


def _whole_pages(g: int, group: SharedGroup) -> tuple[list[Found], int]:
    """(pages that are what their header says, number of headers that were not believed)."""
    whole: list[Found] = []
    taken: set[bytes] = set()
    refused = 0
    for page in np.flatnonzero(group.headers["state"] != EMPTY).tolist():
        header = read_page_header(group.headers, g, page)
        if header is not None:
            key, content, stamp = header
            if key.digest not in taken and content_digest(group.pages[page]) == content:
                taken.add(key.digest)
                whole.append((stamp, page, key))
                continue
        clear_page_header(group.headers, page)
        refused += 1
    return whole, refused


def in_order_of_use(found: list[Found]) -> list[Found]:
    """The first may be evicted first: the longest unused chain, and of a chain its tail before its head.

    A page counts as used when any page behind it was: a head without its tail is still a hit, a tail
    without its head is none.
    """
    used = {key.digest: stamp for stamp, _, key in found}
    depth = {key.digest: 0 for _, _, key in found}
    # A page is always written after its parent, as a rule, so going back in time children come before it.
    for _, _, key in sorted(found, key=lambda f: f[0], reverse=True):
        if key.parent in used:
            used[key.parent] = max(used[key.parent], used[key.digest])
    for _, _, key in sorted(found, key=lambda f: f[0]):
        depth[key.digest] = depth.get(key.parent, -1) + 1
    return sorted(found, key=lambda f: (used[f[2].digest], -depth[f[2].digest]))
