"""What changed among the names of cached pages since somebody last asked.

Bounded: after more changes than it holds only a full list helps, and it says so. Who is told, and how,
is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHANGES = 65_536


@dataclass(frozen=True, slots=True)
class PageChanges:
    """`everything`: the changes are not known, the names as they are now replace all that was told before."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    everything: bool = False


class PageNews:
    """Written by the pool, taken by the step thread. A name is told once, as it stands in the end."""

    __slots__ = ("_everything", "_max_changes", "_there")

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self._max_changes = max_changes
        self._there: dict[bytes, bool] = {}
        self._everything = False

    def __bool__(self) -> bool:
        return self._everything or bool(self._there)

    def stored(self, digest: bytes) -> None:
        self._put(digest, True)

    def removed(self, digest: bytes) -> None:
        self._put(digest, False)

    def start_over(self) -> None:
        """All names are gone, or changed in ways that were not told one by one."""
        self._there.clear()
        self._everything = True

    def take(self) -> PageChanges:
        """The changes since the last call."""
        there, self._there = self._there, {}
        if self._everything:
            self._everything = False
            return PageChanges(everything=True)
        return PageChanges(
            stored=tuple(d for d, is_there in there.items() if is_there),
            removed=tuple(d for d, is_there in there.items() if not is_there),
        )

    def _put(self, digest: bytes, is_there: bool) -> None:
        if self._everything:
            return
        self._there[digest] = is_there
        if len(self._there) > self._max_changes:
            self.start_over()
