"""Programs of a loaded model: one per shape bucket, made when first needed, replayed by one native call.

Implements `kernels.programs.StepPrograms`. Owns the arena all programs share, and the control words. What
must not live here: how a node is computed, how a recording is fused or laid out.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xllm.engine.kernels.native.fusion import fuse
from xllm.engine.kernels.native.handles import Array, Matrix, Pages, Rows, aligned
from xllm.engine.kernels.native.library import STOPPED, check
from xllm.engine.kernels.native.program import Program
from xllm.engine.kernels.native.recording import Recording, Value
from xllm.engine.kernels.native.spaces import SpaceMapper
from xllm.engine.kernels.ops import F32, Buffer
from xllm.engine.kernels.programs import ProgramCounters
from xllm.engine.kernels.spaces import SpaceTable
from xllm.engine.memory.leases import FREED
from xllm.engine.plan import NO_SPACE, SequencePlan
from xllm.errors import InternalError
from xllm.types import KVGroup

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows a program has room for. A step beyond the last runs eagerly."""

StopHook = Callable[[int], None]
"""Called with the number of finished layers when a step has stopped; when it returns, the step goes on."""


class ControlStruct(ctypes.Structure):
    """`xn_control`."""

    _fields_ = (
        ("finished_layers", ctypes.c_int32),
        ("_1", ctypes.c_int32 * 15),
        ("stop", ctypes.c_int32),
        ("stop_after", ctypes.c_int32),
        ("_2", ctypes.c_int32 * 14),
    )


class KVGroupStruct(ctypes.Structure):
    """`xn_kv_group`."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in (
            "num_pages", "num_heads", "num_kv_heads", "head_dim", "num_layers", "window",
            "kv_class", "num_spaces", "space_pages",
        )),
    )  # fmt: skip


class Memory:
    """Bytes with a cached address that grow by need; growing loses the content."""

    __slots__ = ("array", "ptr")

    def __init__(self) -> None:
        self.array: Array = aligned(0, np.uint8)
        self.ptr = 0

    def fit(self, num_bytes: int) -> bool:
        """Whether it had to grow."""
        if num_bytes <= len(self.array):
            return False
        self.array = aligned(num_bytes, np.uint8)
        self.ptr = self.array.ctypes.data
        return True


class Programs:
    """Used by the step thread; `control` may be read and written by any other."""

    def __init__(
        self,
        library: ctypes.CDLL,
        pool: int | None,
        forward: Recording,
        head: Recording,
        layers: Sequence[tuple[KVGroup, Pages]],
        num_heads: int,
        owner: object = None,
        spaces: SpaceMapper | None = None,
    ) -> None:
        """`layers`: the KV groups and their pages, which may have `spaces` behind them. `owner` is kept
        alive: it may own the pool."""
        if head.source is None:
            raise InternalError("the recording of a head has no source")
        self._lib, self._pool, self._owner = library, pool, owner
        self._forward, self._head = _fused(library, forward), _fused(library, head)
        self._hidden: Value = forward.result
        self._source: Value = head.source
        self._num_groups = len(layers)
        self._pages = [pages for _, pages in layers]
        self._spaces = spaces
        structs = (KVGroupStruct * len(layers))(*(_struct(g, p, num_heads, spaces) for g, p in layers))
        self._step: int | None = library.xn_step_create(ctypes.addressof(structs), len(layers))
        if self._step is None:
            raise InternalError("the native kernels could not make a step")
        weakref.finalize(self, library.xn_step_destroy, self._step)
        # Shared and not copied, so that a child or another process can be given the same words.
        self._words = mmap.mmap(-1, mmap.PAGESIZE)
        self.control = ControlStruct.from_buffer(self._words)
        self._control_ptr = ctypes.addressof(self.control)
        self._position = ctypes.c_int64()
        self._position_ptr = ctypes.addressof(self._position)
        self._arena, self._carry = Memory(), Memory()
        self._steps: dict[int, Program] = {}
        self._heads: dict[int, tuple[Program, F32]] = {}
        self._replays = self._eager = self._stops = 0
        self.on_stop: StopHook | None = None

    @property
    def finished_layers(self) -> int:
        return int(self.control.finished_layers)

    def forget_layers(self) -> None:
        """Between two steps: the word speaks of none."""
        self.control.finished_layers = 0

    @property
    def counters(self) -> ProgramCounters:
        return ProgramCounters(
            captures=len(self._steps) + len(self._heads),
            replays=self._replays,
            eager=self._eager,
            stops=self._stops,
            arena_bytes=len(self._arena.array) + len(self._carry.array),
            row_buckets=tuple(sorted(self._steps)),
            logit_buckets=tuple(sorted(self._heads)),
            operations=len(self._forward.nodes) + len(self._head.nodes),
            max_rows=BUCKETS[-1],
        )

    def forward(self, sequences: Sequence[SequencePlan]) -> Buffer | None:
        words, num_rows, num_logit_rows = flatten(sequences, self._num_groups, self._spaces)
        if num_rows > BUCKETS[-1]:
            self._eager += 1
            return None
        program = self._step_program(num_rows)
        self._carry.fit(num_logit_rows * self._hidden.row_bytes)
        address, count = words.buffer_info()
        check(self._lib.xn_step_set(self._step, address, count, len(sequences)))
        self._run(program, self._step, 0, self._carry.ptr)
        width = self._hidden.width
        return Buffer(Rows(self._carry.ptr, num_logit_rows, width, width, self._carry.array, None))

    def head(self, hidden: Buffer, first: int, count: int) -> F32 | None:
        if not isinstance(hidden, Rows) or hidden.ld != self._source.width or count > BUCKETS[-1]:
            return None
        if not 0 <= first <= first + count <= hidden.rows:
            raise InternalError("rows beyond those that yield logits")
        program, logits = self._head_program(count)
        self._run(program, None, count, hidden.ptr + first * self._source.row_bytes)
        return logits[:count]

    def _run(self, program: Program, step: int | None, rows: int, carry: int) -> None:
        self._position.value = 0
        self._replays += 1
        while True:
            code = self._lib.xn_program_run(
                self._pool, program.ptr, program.num_nodes, step, rows, self._arena.ptr, carry,
                self._control_ptr if step is not None else None, self._position_ptr,
            )  # fmt: skip
            if code != STOPPED:
                check(code)
                return
            self._stops += 1
            if self.on_stop is None:
                # Nobody waits for the machine: whoever asked has gone.
                self.control.stop = 0
            else:
                self.on_stop(self.control.finished_layers)

    def _step_program(self, rows: int) -> Program:
        bucket = BUCKETS[bisect_left(BUCKETS, rows)]
        program = self._steps.get(bucket)
        if program is None:
            program = self._steps[bucket] = Program(self._forward, bucket, self._hidden)
            self._grow(program)
        return program

    def _head_program(self, rows: int) -> tuple[Program, F32]:
        bucket = BUCKETS[bisect_left(BUCKETS, rows)]
        found = self._heads.get(bucket)
        if found is None:
            program = Program(self._head, bucket, self._source)
            self._grow(program)
            found = self._heads[bucket] = (program, self._logits(program))
        return found

    def _grow(self, program: Program) -> None:
        if self._arena.fit(program.arena_bytes):
            self._heads = {b: (p, self._logits(p)) for b, (p, _) in self._heads.items()}

    def _logits(self, program: Program) -> F32:
        """What a head's program leaves in the arena, as an array."""
        size = program.max_rows * program.width
        flat = self._arena.array[program.result_at : program.result_at + 4 * size].view(np.float32)
        return flat.reshape(program.max_rows, program.width)


def flatten(
    sequences: Sequence[SequencePlan], num_groups: int, spaces: SpaceTable | None = None
) -> tuple[array[int], int, int]:
    """(the words of `xn_step_set`, rows, rows that yield logits)."""
    heads: list[int] = []
    tokens: list[int] = []
    tables: list[list[int]] = [[] for _ in range(num_groups)]
    skipped = 0
    for sequence in sequences:
        space = NO_SPACE if spaces is None else spaces.space_of(sequence)
        heads += (len(sequence.tokens), sequence.start, sequence.first_logit_row, space)
        skipped += sequence.first_logit_row
        tokens += sequence.tokens
        for table, pages in zip(tables, sequence.pages, strict=True):
            heads.append(len(pages))
            if space == NO_SPACE:
                table += pages
            else:
                table.append(pages.count(FREED))
    words = array("q", heads)
    words.extend(tokens)
    for table in tables:
        words.extend(table)
    return words, len(tokens), len(tokens) - skipped


def _fused(library: ctypes.CDLL, recording: Recording) -> Recording:
    def stride(matrix: Matrix) -> int:
        return int(library.xn_rounded_stride(matrix.ptr))

    return fuse(recording, stride)


def _struct(group: KVGroup, pages: Pages, num_heads: int, spaces: SpaceMapper | None) -> Any:
    return KVGroupStruct(
        pages=pages.ptr,
        num_pages=len(pages.array),
        num_heads=num_heads,
        num_kv_heads=group.num_kv_heads,
        head_dim=group.head_dim,
        num_layers=len(group.layers),
        window=group.window or 0,
        kv_class=pages.kv_class,
        num_spaces=0 if spaces is None else spaces.num_spaces,
        space_pages=0 if spaces is None else spaces.space_pages,
    )
