"""`Backend` over the native kernels, op by op: a call per operation, nothing computed in Python.

Activations are float32 throughout; what enters a product is rounded by the product (to bf16, or to 8-bit
codes per group of 32), each row by itself. Rows are exact by construction, so there is no padding.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xllm.codes import GroupCodes
from xllm.engine.kernels.native.handles import (
    Arena,
    AttentionPlan,
    Indices,
    Matrix,
    Pages,
    Rows,
    Values,
    private_pages,
)
from xllm.engine.kernels.native.library import check
from xllm.engine.kernels.native.packing import Packer, WeightClass
from xllm.engine.kernels.native.plan import make_plan
from xllm.engine.kernels.native.programs import Programs
from xllm.engine.kernels.native.queue import NativeQueue
from xllm.engine.kernels.native.recording import record_forward, record_head
from xllm.engine.kernels.native.sampling import NativeDrawer
from xllm.engine.kernels.ops import F32, I64, Buffer, KVSpan, RopeTable
from xllm.engine.kernels.programs import LoadedModel, StepPrograms
from xllm.errors import InternalError
from xllm.types import KVGroup

HEAD_MULTIPLE = 16
"""The attention kernel takes head sizes that are multiples of this."""

KV_ORDER = "page,kv,layer,head,pairs"
"""K tiles are [dim/2][token][2], V tiles [token/2][dim][2], so that both products read pairs in a row."""

KVDtype = Literal["bfloat16", "int8"]

_KV_CLASSES: dict[KVDtype, tuple[int, int, int]] = {"bfloat16": (0, 2, 0), "int8": (1, 1, 4)}
"""What the library calls it, bytes of an element and of a scale."""

PageMemory = Callable[[int, int], npt.NDArray[np.uint8]]
"""(number of pages, bytes of a page) → memory (page, byte)."""

_PROBE_ROWS = (1, 3, 7, 16)


def _rows(x: Buffer) -> Rows:
    if isinstance(x, Rows):
        return x
    raise TypeError("a handle of another kind or backend")


def _values(x: Buffer) -> Values:
    if isinstance(x, Values):
        return x
    raise TypeError("a handle of another kind or backend")


def _indices(x: Buffer) -> Indices:
    if isinstance(x, Indices):
        return x
    raise TypeError("a handle of another kind or backend")


def _matrix(x: Buffer) -> Matrix:
    if isinstance(x, Matrix):
        return x
    raise TypeError("a handle of another kind or backend")


def _pages(x: Buffer) -> Pages:
    if isinstance(x, Pages):
        return x
    raise TypeError("a handle of another kind or backend")


class NativeOps:
    """Owns the thread pool and the activation memory. Used by one thread at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        num_threads: int,
        linear_class: WeightClass = "bf16",
        head_class: WeightClass = "bf16",
        keeps_codes: bool = False,
        kv_dtype: KVDtype = "bfloat16",
        page_memory: PageMemory = private_pages,
    ) -> None:
        """`linear_class` is how linears are kept, `head_class` embedding and head.

        With `keeps_codes`, what the file stores as codes in groups of 32 is computed on as it is stored.
        `page_memory` is called once per KV group, in order.
        """
        self._page_memory = page_memory
        self._lib = library
        self._linear_class, self._head_class = linear_class, head_class
        self._keeps_codes = keeps_codes
        self._kv_class, *self._kv_bytes = _KV_CLASSES[kv_dtype]
        self._arena = Arena()
        self._pool: int | None = library.xn_pool_create(num_threads)
        if self._pool is None:
            raise InternalError("the native thread pool could not be started")
        self._end = weakref.finalize(self, library.xn_pool_destroy, self._pool)
        self._packer = Packer(library, self._pool)
        self._deterministic = False

    @property
    def packer(self) -> Packer:
        """Made the weights of this backend; for who keeps them."""
        return self._packer

    @property
    def packed_bytes(self) -> Mapping[str, int]:
        """Bytes of packed weights by class."""
        return self._packer.num_bytes

    @property
    def row_multiple(self) -> int:
        return 1

    @property
    def deterministic(self) -> bool:
        return self._deterministic

    def probe(self, weights: Sequence[Buffer]) -> None:
        """Exactness is by construction; a few rows of every shape confirm that it holds on this CPU."""
        distinct = {(m.num_out, m.num_in): m for m in map(_matrix, weights)}.values()
        self._deterministic = all(self._exact(m) for m in distinct)

    def _exact(self, matrix: Matrix) -> bool:
        generator = np.random.default_rng(0)
        noise = generator.standard_normal((max(_PROBE_ROWS), matrix.num_in), dtype=np.float32)
        alone = np.concatenate([self._product(row[None], matrix) for row in noise])
        return all(
            np.array_equal(
                self._product(noise[:count], matrix).view(np.uint32), alone[:count].view(np.uint32)
            )
            for count in _PROBE_ROWS
        )

    def _product(self, x: F32, matrix: Matrix) -> F32:
        return self.to_numpy(self.linear(self.rows(x), Buffer(matrix))).copy()

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def row_drawer(self) -> NativeDrawer:
        """Draws tokens on this backend's threads, so between its steps only."""
        return NativeDrawer(self._lib, self._pool)

    # Buffers.

    def rows(self, values: F32) -> Buffer:
        """Activations from an array: for tests and the probe."""
        x = self._arena.rows(*values.shape)
        np.asarray(x)[...] = values
        return Buffer(x)

    def matrix(self, values: F32) -> Buffer:
        return Buffer(self._packer.values(values, self._linear_class))

    def table(self, values: F32) -> Buffer:
        return Buffer(self._packer.values(values, self._head_class))

    def tied_matrix(self, table: Buffer) -> Buffer:
        return table

    @property
    def keeps_codes(self) -> bool:
        return self._keeps_codes

    def matrix_of_codes(self, codes: GroupCodes) -> Buffer:
        return Buffer(self._packer.codes(codes))

    def vector(self, values: F32) -> Buffer:
        return Buffer(Values(values))

    def indices(self, values: I64) -> Buffer:
        return Buffer(Indices(values))

    def kv_pages(self, group: KVGroup, num_pages: int) -> Buffer:
        memory = self._page_memory(num_pages, group.page_bytes(*self._kv_bytes))
        return Buffer(Pages(memory, self._kv_class))

    def page_memory(self, pages: Buffer) -> npt.NDArray[np.uint8] | None:
        return _pages(pages).array

    def copy_page(self, pages: Buffer, src: int, dst: int) -> None:
        array = _pages(pages).array
        array[dst] = array[src]

    def zero_pages(self, pages: Buffer, which: Sequence[int]) -> None:
        """Nothing is cleared here: the kernel does it as it writes (`Pages`)."""
        _pages(pages).take(which)

    def attention_plan(
        self, group: KVGroup, num_heads: int, spans: Sequence[KVSpan], num_rows: int
    ) -> Buffer:
        plan = make_plan(self._lib, group, num_heads, spans, num_rows)
        plan.struct.kv_class = self._kv_class
        return Buffer(plan)

    def to_numpy(self, x: Buffer) -> F32:
        return np.asarray(_rows(x))

    def programs(self, model: LoadedModel) -> Programs:
        """The model's operations, recorded. Raises what the model raises if it needs more than `Ops`."""
        layers = [(g, _pages(p)) for g, p in zip(model.layout.groups, model.pages, strict=True)]
        forward = record_forward(model.forward, model.pages)
        head = record_head(model.head, forward.result.width)
        return Programs(self._lib, self._pool, forward, head, layers, model.num_heads, owner=self)

    def queue(self, programs: StepPrograms) -> NativeQueue:
        """Of steps of these programs. Its thread inherits how the caller's is scheduled."""
        if not isinstance(programs, Programs):
            raise TypeError("programs of another backend")
        return NativeQueue(programs)

    # Operations of a model.

    def embedding(self, ids: Buffer, table: Buffer, scale: float | None = None) -> Buffer:
        i, t = _indices(ids), _matrix(table)
        y = self._arena.rows(i.count, t.num_in)
        check(self._lib.xn_embedding(self._pool, t.ptr, i.ptr, i.count, scale or 0.0, y.ptr, y.ld))
        return Buffer(y)

    def linear(self, x: Buffer, weight: Buffer, bias: Buffer | None = None) -> Buffer:
        a, m = _rows(x), _matrix(weight)
        b = None if bias is None else _values(bias).ptr
        y = self._arena.rows(a.rows, m.num_out)
        check(self._lib.xn_linear(self._pool, m.ptr, a.ptr, a.rows, a.ld, b, y.ptr, y.ld))
        return Buffer(y)

    def rms_norm(self, x: Buffer, weight: Buffer, eps: float, weight_offset: float = 0.0) -> Buffer:
        a, w = _rows(x), _values(weight)
        y = self._arena.rows(a.rows, a.width)
        check(
            self._lib.xn_rms_norm(
                self._pool, a.ptr, a.rows, a.width // w.width, w.width, a.ld, w.ptr, eps,
                weight_offset, y.ptr, y.ld,
            )
        )  # fmt: skip
        return Buffer(y)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        a, b = _rows(x), _rows(y)
        z = self._arena.rows(a.rows, a.width)
        check(self._lib.xn_add(self._pool, a.ptr, a.ld, b.ptr, b.ld, a.rows, a.width, z.ptr, z.ld))
        return Buffer(z)

    def silu_mul(self, gate_up: Buffer) -> Buffer:
        return self._gated(self._lib.xn_silu_mul, gate_up)

    def gelu_tanh_mul(self, gate_up: Buffer) -> Buffer:
        return self._gated(self._lib.xn_gelu_tanh_mul, gate_up)

    def split_columns(self, x: Buffer, widths: Sequence[int]) -> tuple[Buffer, ...]:
        a = _rows(x)
        parts, first = [], 0
        for width in widths:
            parts.append(Buffer(a.columns(first, width)))
            first += width
        return tuple(parts)

    def rope_rows(self, table: RopeTable, positions: Buffer) -> RopeTable:
        i = _indices(positions)
        return RopeTable(cos=self._taken(_values(table.cos), i), sin=self._taken(_values(table.sin), i))

    def rope(self, x: Buffer, rows: RopeTable) -> Buffer:
        a, cos, sin = _rows(x), _rows(rows.cos), _rows(rows.sin)
        half = cos.width
        y = self._arena.rows(a.rows, a.width)
        check(
            self._lib.xn_rope(
                self._pool, a.ptr, a.ld, a.rows, a.width // (2 * half), half, cos.ptr, sin.ptr,
                cos.ld, y.ptr, y.ld,
            )
        )  # fmt: skip
        return Buffer(y)

    def attention(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        pages: Buffer,
        layer: int,
        plan: Buffer,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Buffer:
        if not isinstance(plan, AttentionPlan):
            raise TypeError("a plan of another backend")
        a, b, c = _rows(q), _rows(k), _rows(v)
        y = self._arena.rows(a.rows, a.width)
        check(
            self._lib.xn_attention(
                self._pool, plan.ptr, _pages(pages).ptr, layer, a.ptr, a.ld, b.ptr, b.ld, c.ptr,
                c.ld, scale, softcap or 0.0, y.ptr, y.ld,
            )
        )  # fmt: skip
        return Buffer(y)

    def select_rows(self, x: Buffer, rows: Buffer) -> Buffer:
        a, i = _rows(x), _indices(rows)
        if i.count and not 0 <= int(i.array.min()) <= int(i.array.max()) < a.rows:
            raise InternalError("a row number is out of range")
        y = self._arena.rows(i.count, a.width)
        check(self._lib.xn_select_rows(self._pool, a.ptr, a.ld, i.ptr, i.count, a.width, y.ptr, y.ld))
        return Buffer(y)

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        a = _rows(x)
        y = self._arena.rows(a.rows, a.width)
        check(self._lib.xn_softcap(self._pool, a.ptr, a.ld, a.rows, a.width, cap, y.ptr, y.ld))
        return Buffer(y)

    def end_layer(self, layer: int) -> None:
        """Nobody can stop an eager step."""

    def all_reduce(self, x: Buffer) -> Buffer:
        return x

    def all_gather(self, x: Buffer) -> Buffer:
        return x

    def all_to_all(self, x: Buffer) -> Buffer:
        return x

    def _taken(self, table: Values, rows: Indices) -> Buffer:
        if not 0 <= int(rows.array.min()) <= int(rows.array.max()) < len(table.array):
            raise InternalError("a position is beyond the rotary tables")
        y = self._arena.rows(rows.count, table.width)
        check(
            self._lib.xn_select_rows(
                self._pool, table.ptr, table.width, rows.ptr, rows.count, table.width, y.ptr, y.ld,
            )
        )  # fmt: skip
        return Buffer(y)

    def _gated(self, function: Callable[..., int], gate_up: Buffer) -> Buffer:
        a = _rows(gate_up)
        y = self._arena.rows(a.rows, a.width // 2)
        check(function(self._pool, a.ptr, a.ld, a.rows, y.width, y.ptr, y.ld))
        return Buffer(y)
