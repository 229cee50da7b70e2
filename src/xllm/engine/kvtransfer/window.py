"""A peer's pages in our own address space: mapped once per connection, written to by leased slot only.

Whose slots they are must not be decided here; that a slot is within the pool is.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence

import numpy as np

from xllm.engine.kvtransfer.memory import Bytes2D
from xllm.engine.surviving.memory import cannot_shrink
from xllm.errors import UnavailableError


class Window:
    """`groups[g]` are the peer's pages of group g (page, byte)."""

    def __init__(self, fd: int, places: Sequence[tuple[int, int]], page_bytes: Sequence[int]) -> None:
        """`places[g]` = (offset in the file, number of pages). Closes `fd` in any case.

        Raises UnavailableError for a file that does not hold them for good: reading behind the end of a
        file that shrank would end this process.
        """
        try:
            size = os.fstat(fd).st_size
            if not stat.S_ISREG(os.fstat(fd).st_mode) or not cannot_shrink(fd):
                raise _refuse("its file could shrink")
            if len(places) != len(page_bytes):
                raise _refuse("it has other groups")
            self.groups = tuple(
                _map(fd, size, *place, count) for place, count in zip(places, page_bytes, strict=True)
            )
        except (OSError, ValueError) as error:
            raise _refuse("they cannot be mapped") from error
        finally:
            os.close(fd)


def _map(fd: int, size: int, offset: int, num_pages: int, page_bytes: int) -> Bytes2D:
    num_bytes = num_pages * page_bytes
    if num_pages < 0 or offset < 0 or offset % mmap.ALLOCATIONGRANULARITY or offset + num_bytes > size:
        raise _refuse("they lie outside its file")
    if not num_bytes:
        return np.zeros((0, page_bytes), np.uint8)
    mapped = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, offset=offset)
    return np.frombuffer(mapped, np.uint8).reshape(num_pages, page_bytes)


def _refuse(why: str) -> UnavailableError:
    return UnavailableError(f"the peer's pages cannot be written to: {why}", code="transfer_refused")
