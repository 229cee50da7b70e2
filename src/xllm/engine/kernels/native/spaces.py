"""Spaces of KV pages on the CPU: the pool's file mapped again, page by page, in a sequence's order.

One reservation per KV group: the pool itself, then the spaces. A thread of its own maps what it is told to,
and rests a lot; a sequence whose pages are not all there yet is read through its page table, so that no step
ever waits for a mapping. What must not live here: who gets which space or page.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xllm.engine.kernels.spaces import SpaceTable
from xllm.engine.memory.spaces import UNMAPPED
from xllm.engine.surviving import SharedPages
from xllm.errors import ConfigError

MAX_MAPPINGS = 32_000
_OTHERS = 8192
"""Mappings that the rest of the process may need."""
_MAX_RESERVED_BYTES = 8 << 40
"""Addresses for one group: a process has 128 TiB of them."""
_REST = 3.0
"""Rests this many times as long as it worked, so that a step which shares its core loses little."""
_LINGER_S = 5.0
_PROT_NONE, _PROT_READ_WRITE = 0, 3
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE, _POPULATE = 0x1, 0x2, 0x10, 0x20, 0x4000, 0x8000
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class _Region:
    """`file_offset` and `address` are those of the pool's first page. `memory` keeps addresses reserved."""

    memory: object
    address: int
    file_offset: int
    num_pages: int
    page_bytes: int


class SpaceMapper(SpaceTable):
    """Implements `memory.spaces.Mapper`. Orders and questions come from the step thread."""

    def __init__(
        self,
        shared: SharedPages,
        num_groups: int,
        space_pages: int,
        max_num_seqs: int,
        max_mappings: int | None = None,
    ) -> None:
        super().__init__(num_groups)
        self.space_pages = space_pages
        self.max_mappings = _most_mappings() if max_mappings is None else max_mappings
        self.num_spaces = 0
        self._shared, self._max_num_seqs = shared, max_num_seqs
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._regions: list[_Region] = []
        self._orders: OrderedDict[tuple[int, int, int], int] = OrderedDict()
        self._changed = threading.Condition()
        self._busy = False
        self._thread: threading.Thread | None = None

    # -- memory -----------------------------------------------------------------------------------

    def memory(self, num_pages: int, page_bytes: int) -> npt.NDArray[np.uint8]:
        """The pool of the next group, (page, byte), with its spaces behind it. Raises ConfigError."""
        if page_bytes % mmap.PAGESIZE:
            raise ConfigError(
                f"kv_memory=xtensor: a page of {page_bytes} bytes is not a multiple of {mmap.PAGESIZE}; "
                "use kv_memory=paged or another kv_cache_dtype",
                param="kv_memory",
            )
        self._shared.next_group(num_pages, page_bytes)
        group = self._shared.groups[-1]
        space_bytes = self.space_pages * page_bytes
        # One for each page is more than can hold anything at a time.
        num_spaces = min(num_pages + self._max_num_seqs, _MAX_RESERVED_BYTES // space_bytes)
        self.num_spaces = min(self.num_spaces, num_spaces) if self._regions else num_spaces
        size = num_pages * page_bytes + num_spaces * space_bytes
        address = self._mmap(None, size, _PROT_NONE, _PRIVATE | _ANONYMOUS | _NORESERVE, -1, 0)
        if address is None:
            raise ConfigError(
                f"kv_memory=xtensor: {size >> 30} GiB of addresses cannot be reserved; use kv_memory=paged",
                param="kv_memory",
            )
        memory = (ctypes.c_uint8 * (num_pages * page_bytes)).from_address(address)
        # Not at exit: threads may still be using it, and the memory goes with the process.
        weakref.finalize(memory, self._libc.munmap, address, size).atexit = False
        region = _Region(memory, address, group.offset, num_pages, page_bytes)
        if not self._map_file(region, address, 0, num_pages, populate=False):
            raise ConfigError("kv_memory=xtensor: the pool cannot be mapped", param="kv_memory")
        self._regions.append(region)
        pages = np.frombuffer(memoryview(memory), np.uint8).reshape(num_pages, page_bytes)
        self._shared.over(pages)
        return pages

    # -- orders: step thread ------------------------------------------------------------------------

    def map(self, space: int, group: int, index: int, page: int) -> None:
        with self._changed:
            there = self.entry(space, group, index)
            if there[index] == page:
                self._orders.pop((space, group, index), None)
                return
            self._orders[space, group, index] = page
            self._wake()

    def unmap(self, space: int) -> None:
        with self._changed:
            for g, there in enumerate(self.empty(space)):
                for index in range(len(there)):
                    self._orders.pop((space, g, index), None)
                # Before any later order for the same entries: those wait behind it.
                before = self._orders.get((space, g, UNMAPPED), 0)
                self._orders[space, g, UNMAPPED] = max(before, len(there))
            self._wake()

    def wait(self) -> None:
        """Until everything ordered was done. For tests and tools."""
        with self._changed:
            self._changed.wait_for(lambda: not self._orders and not self._busy)

    # -- mapping: its own thread ----------------------------------------------------------------------

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="xllm-mapper", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._orders, _LINGER_S):
                    # Whoever has further orders starts another one: so nobody need end this one.
                    self._thread = None
                    return
                (space, group, index), value = self._orders.popitem(last=False)
                there = self._there.get(space)
                if index != UNMAPPED and there is not None:
                    if there[group][index] == value:
                        continue
                    there[group][index] = UNMAPPED
                self._busy = True
            began_s = time.monotonic()
            done = self._apply(space, group, index, value)
            with self._changed:
                self._busy = False
                self._num_failed += not done
                # An unmap that came meanwhile has taken the space's list away and waits behind this one.
                if done and index != UNMAPPED and there is not None:
                    self._num_maps += 1
                    there[group][index] = value
                self._changed.notify_all()
            time.sleep(_REST * (time.monotonic() - began_s))

    def _apply(self, space: int, group: int, index: int, value: int) -> bool:
        region = self._regions[group]
        first = region.num_pages + space * self.space_pages
        if index == UNMAPPED:
            size = value * region.page_bytes
            at = region.address + first * region.page_bytes
            flags = _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED
            return size == 0 or self._mmap(at, size, _PROT_NONE, flags, -1, 0) is not None
        at = region.address + (first + index) * region.page_bytes
        return self._map_file(region, at, value, 1, populate=True)

    def _map_file(self, region: _Region, at: int, page: int, count: int, *, populate: bool) -> bool:
        flags = _SHARED | _FIXED | (_POPULATE if populate else 0)
        offset = region.file_offset + page * region.page_bytes
        size = count * region.page_bytes
        return self._mmap(at, size, _PROT_READ_WRITE, flags, self._shared.fd, offset) is not None

    def _mmap(self, at: int | None, size: int, prot: int, flags: int, fd: int, offset: int) -> int | None:
        found = self._libc.mmap(at, size, prot, flags, fd, offset)
        return None if found in (None, _FAILED) else int(found)


def _most_mappings() -> int:
    """Below what the kernel allows a process, and few enough for it to stay quick."""
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return MAX_MAPPINGS
    return max(0, min(MAX_MAPPINGS, allowed - _OTHERS))
