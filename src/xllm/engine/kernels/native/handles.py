"""Behind the native backend's handles: memory with a cached address, given back by reference count.

A step allocates nothing once every size was seen: a dropped activation's memory goes to the free list of
its size class and, being warm in the caches, is handed out first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xllm.engine.kernels.native.library import AttentionPlanStruct
from xllm.engine.kernels.native.prefault import Prefault
from xllm.engine.kernels.ops import F32

_ALIGN = 64
_PREFAULT_FROM = 16 << 20
"""Pools smaller than this are not worth a thread."""

Array = npt.NDArray[Any]
_Piece = tuple[int, Array]


def aligned(count: int, dtype: npt.DTypeLike) -> Array:
    """An uninitialised array of `count` elements that begins on a cache line."""
    size = np.dtype(dtype).itemsize
    raw = np.empty(count * size + _ALIGN, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGN
    return raw[offset : offset + count * size].view(dtype)


class Rows:
    """Activations (rows, width) in float32, `ld` elements between rows. A view keeps its owner alive."""

    __slots__ = ("_home", "_memory", "ld", "ptr", "rows", "width")

    def __init__(
        self, ptr: int, rows: int, width: int, ld: int, memory: object, home: list[_Piece] | None
    ) -> None:
        self.ptr = ptr
        self.rows = rows
        self.width = width
        self.ld = ld
        self._memory = memory
        self._home = home

    def columns(self, first: int, width: int) -> Rows:
        return Rows(self.ptr + 4 * first, self.rows, width, self.ld, self, None)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Lets numpy see the memory; the array holds this handle, so the memory is not reused under it."""
        return {
            "version": 3,
            "typestr": "<f4",
            "shape": (self.rows, self.width),
            "strides": (4 * self.ld, 4),
            "data": (self.ptr, False),
        }

    def __del__(self) -> None:
        if self._home is not None:
            self._home.append((self.ptr, self._memory))  # type: ignore[arg-type]


class Arena:
    """Free lists of activation memory by power of two. Not thread-safe: one step runs at a time."""

    def __init__(self) -> None:
        self._free: list[list[_Piece]] = [[] for _ in range(48)]
        self.num_bytes = 0

    def rows(self, rows: int, width: int) -> Rows:
        """Uninitialised (rows, width)."""
        power = (rows * width - 1).bit_length()
        free = self._free[power]
        ptr, memory = free.pop() if free else self._fresh(power)
        return Rows(ptr, rows, width, width, memory, free)

    def _fresh(self, power: int) -> _Piece:
        memory = aligned(1 << power, np.float32)
        self.num_bytes += memory.nbytes
        return memory.ctypes.data, memory


class Values:
    """A float32 vector, or a table of them (rope), that lives as long as the model."""

    __slots__ = ("array", "ptr", "width")

    def __init__(self, values: F32) -> None:
        self.array: F32 = aligned(values.size, np.float32).reshape(values.shape)
        self.array[...] = values
        self.ptr: int = self.array.ctypes.data
        self.width = int(values.shape[-1])


class Indices:
    """Row numbers, ids or positions, int64."""

    __slots__ = ("array", "count", "ptr")

    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        self.array = np.ascontiguousarray(values, dtype=np.int64)
        self.ptr: int = self.array.ctypes.data
        self.count = len(self.array)


class Matrix:
    """A packed weight, owned by the library until this handle goes. `memory` holds its panels where the
    library does not, and lives as long."""

    __slots__ = ("_library", "_memory", "num_in", "num_out", "ptr")

    def __init__(self, library: ctypes.CDLL, ptr: int, memory: object = None) -> None:
        self._library = library
        self._memory = memory
        self.ptr = ptr
        self.num_out: int = library.xn_matrix_num_out(ptr)
        self.num_in: int = library.xn_matrix_num_in(ptr)

    def __del__(self) -> None:
        self._library.xn_matrix_free(self.ptr)


class Pages:
    """Tiles (P, 2, L, K, …) as raw bytes; what a tile holds is the library's.

    A page is not cleared when it comes to a new owner: the kernel clears what it could read before it is
    written (attention.cpp, `write_rows`), and no weight but zero ever meets the rest.
    """

    __slots__ = ("__weakref__", "_prefault", "array", "kv_class", "ptr")

    def __init__(self, array: Array, kv_class: int = 0) -> None:
        """`array` (page, byte) begins on a cache line."""
        self.kv_class = kv_class
        self.array = array
        self.ptr: int = self.array.ctypes.data
        self._prefault: Prefault | None = None
        if self.array.nbytes >= _PREFAULT_FROM:
            self._prefault = Prefault(self.array.reshape(-1))
            weakref.finalize(self, self._prefault.close)

    def take(self, which: Sequence[int]) -> None:
        """These pages have come to a new owner."""
        if which and self._prefault is not None:
            self._prefault.use((max(which) + 1) * self.array.shape[1])


def private_pages(num_pages: int, page_bytes: int) -> Array:
    """Memory for pages that ends with the process, (page, byte).

    calloc'd: it is taken when it is first touched, by the prefault thread where that is in time.
    """
    raw = np.zeros(num_pages * page_bytes + _ALIGN, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGN
    return raw[offset : offset + num_pages * page_bytes].reshape(num_pages, page_bytes)


class AttentionPlan:
    """The C struct and the arrays it points to."""

    __slots__ = ("_arrays", "ptr", "struct")

    def __init__(self, struct: AttentionPlanStruct, arrays: tuple[Array, ...]) -> None:
        self.struct = struct
        self._arrays = arrays
        self.ptr = ctypes.addressof(struct)
