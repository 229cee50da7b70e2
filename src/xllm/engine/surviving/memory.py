"""The inherited file that holds KV pages: its size, its mappings, and whose pages it says it has.

Regions lie one behind the other: file header; then for each KV group its table of page headers and, from a
multiple of 2 MiB on, its pages. What a page means belongs to the kernels and the page manager.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from xllm.engine.surviving.headers import (
    EMPTY,
    FILE_HEADER_BYTES,
    PAGE_HEADER,
    FileHeader,
    Table,
    clear_file_header,
    read_file_header,
    write_file_header,
)
from xllm.errors import ConfigError, InternalError

_HUGE = 2 << 20
"""Pages of the kernel may be this large if address and offset allow it."""


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """One KV group's headers and pages (page, byte); `offset` is where in the file these begin."""

    headers: Table
    pages: npt.NDArray[np.uint8]
    offset: int = 0


class SharedPages:
    """Made over an inherited descriptor before the model is loaded; the groups come with the runner."""

    def __init__(self, fd: int, *, lasting: bool = True) -> None:
        """Takes no ownership of `fd`. Raises ConfigError for anything that might shrink under a mapping.

        Not `lasting`: the file ends with this process, so nobody need keep account of what is in it.
        """
        self.lasting = lasting
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not cannot_shrink(fd):
            raise ConfigError("pages-fd: not a sealed anonymous file", param="pages_fd")
        self._fd = fd
        self._end = FILE_HEADER_BYTES
        self._head = memoryview(self._map(0, FILE_HEADER_BYTES)).cast("B")
        self.found = read_file_header(self._head)
        self.groups: list[SharedGroup] = []

    @property
    def fd(self) -> int:
        """The file; owned by whoever gave it."""
        return self._fd

    @property
    def resident_bytes(self) -> int:
        """Memory that the file takes already, whoever filled it."""
        return os.fstat(self._fd).st_blocks * 512

    def num_pages(self, layout_digest: str, page_bytes: tuple[int, ...]) -> int | None:
        """How many pages per group an engine of this layout left, so that the next one takes as many."""
        found = self.found
        if found is None or found.layout_digest != layout_digest or not found.groups:
            return None
        counts = {count for count, _ in found.groups}
        same = tuple(size for _, size in found.groups) == page_bytes
        return counts.pop() if same and len(counts) == 1 else None

    def next_group(self, num_pages: int, page_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory of the next KV group in order, (page, byte): whatever an earlier engine left, else zeros."""
        table_bytes = num_pages * PAGE_HEADER.itemsize
        table_at = self._end
        pages_at = -(-(table_at + table_bytes) // _HUGE) * _HUGE
        self._end = -(-(pages_at + num_pages * page_bytes) // _HUGE) * _HUGE
        headers = np.frombuffer(self._map(table_at, pages_at - table_at), np.uint8)[:table_bytes]
        pages = np.frombuffer(self._map(pages_at, self._end - pages_at), np.uint8)
        group = SharedGroup(
            headers=headers.view(PAGE_HEADER),
            pages=pages[: num_pages * page_bytes].reshape(num_pages, page_bytes),
            offset=pages_at,
        )
        self.groups.append(group)
        return group.pages

    def over(self, pages: npt.NDArray[np.uint8]) -> None:
        """The last group's pages are mapped here too: this mapping of theirs is the only one from now on."""
        self.groups[-1] = replace(self.groups[-1], pages=pages)

    def bind(self, numerics_class: str, layout_digest: str) -> bool:
        """All groups are there: whether the pages left behind are this engine's own kind.

        If not, every header is emptied first; from now on the file is this engine's.
        """
        groups = tuple(group.pages.shape for group in self.groups)
        own = FileHeader(numerics_class=numerics_class, layout_digest=layout_digest, groups=groups)
        if self.found == own:
            return True
        clear_file_header(self._head)
        self.clear()
        write_file_header(self._head, own)
        self.found = None
        return False

    def clear(self) -> None:
        """Empty the header of every page."""
        for group in self.groups:
            group.headers["state"] = EMPTY

    def _map(self, offset: int, size: int) -> mmap.mmap:
        if os.fstat(self._fd).st_size < offset + size:
            os.ftruncate(self._fd, offset + size)
        if os.fstat(self._fd).st_size < offset + size:
            raise InternalError("the file of surviving pages is too small")
        return mmap.mmap(self._fd, size, mmap.MAP_SHARED, offset=offset)


def cannot_shrink(fd: int) -> bool:
    """Whether nobody can take pages away under who has mapped them."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
