"""Writes and empties the headers of surviving pages as their names come and go.

Invariant: a header is valid only while its page is complete and named. It is emptied when the name goes,
which is before anybody may write the page, and written when the page has been computed. One thread, the
step thread, does both, so there is nothing to race with; a process that is killed leaves whole headers.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

from xllm.engine.memory.pool import PrefixKey
from xllm.engine.surviving.headers import EMPTY, clear_page_header, content_digest, write_page_header
from xllm.engine.surviving.memory import SharedPages


class Keeper:
    """Between steps `write` adds what has become complete; it is the only call that takes time."""

    def __init__(self, shared: SharedPages, first_stamp: int = 0) -> None:
        self._shared = shared
        self._stamps = count(first_stamp)
        # A page without a header is not taken over and nothing else, so headers may wait.
        self._due: OrderedDict[tuple[int, int], PrefixKey] = OrderedDict()

    @property
    def num_due(self) -> int:
        return len(self._due)

    def named(self, group: int, page: int, key: PrefixKey) -> None:
        """The page is complete and holds `key`."""
        self._due[group, page] = key

    def unnamed(self, group: int, page: int) -> None:
        """The page may be written by anybody from now on."""
        self._due.pop((group, page), None)
        clear_page_header(self._shared.groups[group].headers, page)

    def all_unnamed(self, group: int) -> None:
        self._due = OrderedDict((at, key) for at, key in self._due.items() if at[0] != group)
        self._shared.groups[group].headers["state"] = EMPTY

    def write(self, limit: int | None = None) -> int:
        """Write headers of at most `limit` pages, the oldest first; how many."""
        num_written = 0
        while self._due and (limit is None or num_written < limit):
            (group, page), key = self._due.popitem(last=False)
            memory = self._shared.groups[group]
            content = content_digest(memory.pages[page])
            write_page_header(memory.headers, group, page, next(self._stamps), key, content)
            num_written += 1
        return num_written
