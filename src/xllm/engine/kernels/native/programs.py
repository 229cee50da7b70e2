"""Programs of a loaded model: one per shape bucket, made when first needed, replayed by one native call.

Implements `kernels.programs.StepPrograms`. Owns the arena all programs share, and the control words. What
must not live here: how a node is computed, how a recording is fused or laid out.
"""

from __future__ import annotations

import ctypes
import mmap
import time
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
from xllm.engine.kernels.native.recording import Op, Recording, Value
from xllm.engine.kernels.native.structs import ControlStruct, KVGroupStruct, group_struct
from xllm.engine.kernels.ops import F32, Buffer
from xllm.engine.kernels.programs import ProgramCounters
from xllm.engine.plan import SequencePlan
from xllm.errors import InternalError
from xllm.types import KVGroup

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows a program has room for. A step beyond the last runs eagerly."""

StopHook = Callable[[int], None]
"""Called with the number of finished layers when a step has stopped; when it returns, the step goes on."""


class Memory:
    """Bytes with a cached address that grow by need; growing loses the content."""

    __slots__ = ("array", "ptr")

    def __init__(self) -> None:
        self.array: Array = aligned(0, np.uint8)
        self.ptr = 0

    def fit(self, num_bytes: int) -> None:
        """Whoever still uses what was there holds the array."""
        if num_bytes > len(self.array):
            self.array = aligned(num_bytes, np.uint8)
            self.ptr = self.array.ctypes.data


class Programs:
    """Used by the step thread, and by the queue over them; `control` may be read and written by any other."""

    def __init__(
        self,
        library: ctypes.CDLL,
        pool: int | None,
        forward: Recording,
        head: Recording,
        layers: Sequence[tuple[KVGroup, Pages]],
        num_heads: int,
        owner: object = None,
    ) -> None:
        """`layers`: the KV groups and their pages. `owner` is kept alive: it may own the pool."""
        if head.source is None:
            raise InternalError("the recording of a head has no source")
        self.library, self.pool, self._owner = library, pool, owner
        self._forward, self._head = _fused(library, forward), _fused(library, head)
        self._hidden: Value = forward.result
        self._source: Value = head.source
        self.pages = [pages for _, pages in layers]
        self._groups = (KVGroupStruct * len(layers))(*(group_struct(g, p, num_heads) for g, p in layers))
        self._step = self.new_step()
        # Shared and not copied, so that a child or another process can be given the same words.
        self._words = mmap.mmap(-1, mmap.PAGESIZE)
        self.control = ControlStruct.from_buffer(self._words)
        self._control_ptr = ctypes.addressof(self.control)
        self._position = ctypes.c_int64()
        self._position_ptr = ctypes.addressof(self._position)
        self.arena, self.carry = Memory(), Memory()
        self._steps: dict[int, Program] = {}
        self._heads: dict[int, Program] = {}
        self._replays = self._eager = self._stops = 0
        self._num_layers = max((1 + n.layer for n in forward.nodes if n.op is Op.END_LAYER), default=0)
        self._traced = False
        self._stamps: Any = None
        self.began_s = 0.0
        self.layer_stamps: tuple[int, ...] = ()
        self.on_stop: StopHook | None = None

    @property
    def finished_layers(self) -> int:
        return int(self.control.finished_layers)

    def forget_layers(self) -> None:
        """Between two steps: the word speaks of none."""
        self.control.finished_layers = 0

    def trace_layers(self, on: bool) -> None:
        self._traced = on
        self._stamps = self.new_stamps()
        self.layer_stamps = ()

    def new_stamps(self) -> Any:
        """Room for one step's; None unless they are asked for."""
        return (ctypes.c_int64 * (1 + self._num_layers))() if self._traced else None

    @property
    def counters(self) -> ProgramCounters:
        return ProgramCounters(
            captures=len(self._steps) + len(self._heads),
            replays=self._replays,
            eager=self._eager,
            stops=self._stops,
            arena_bytes=len(self.arena.array) + len(self.carry.array),
            row_buckets=tuple(sorted(self._steps)),
            logit_buckets=tuple(sorted(self._heads)),
            operations=len(self._forward.nodes) + len(self._head.nodes),
            max_rows=BUCKETS[-1],
        )

    def forward(self, sequences: Sequence[SequencePlan]) -> Buffer | None:
        words, num_rows, num_logit_rows = flatten(sequences, len(self.pages))
        program = self.step_program(num_rows)
        if program is None:
            self._eager += 1
            return None
        self.carry.fit(num_logit_rows * self.hidden_bytes)
        address, count = words.buffer_info()
        check(self.library.xn_step_set(self._step, address, count, len(sequences)))
        self.began_s = time.monotonic()
        self._run(program, self._step, 0, self.carry.ptr)
        if self._stamps is not None:
            self.layer_stamps = tuple(self._stamps)
        width = self._hidden.width
        return Buffer(Rows(self.carry.ptr, num_logit_rows, width, width, self.carry.array, None))

    def head(self, hidden: Buffer, first: int, count: int) -> F32 | None:
        if not isinstance(hidden, Rows) or hidden.ld != self._source.width or count > BUCKETS[-1]:
            return None
        if not 0 <= first <= first + count <= hidden.rows:
            raise InternalError("rows beyond those that yield logits")
        program = self.head_program(count)
        self._run(program, None, count, hidden.ptr + first * self._source.row_bytes)
        return self.logits_of(program)[:count]

    # What a queue of steps needs beside.

    def new_step(self) -> int:
        """An `xn_step` that lives as long as these programs."""
        step: int | None = self.library.xn_step_create(ctypes.addressof(self._groups), len(self._groups))
        if step is None:
            raise InternalError("the native kernels could not make a step")
        weakref.finalize(self, self.library.xn_step_destroy, step)
        return step

    @property
    def hidden_bytes(self) -> int:
        """Of a row in the carry."""
        return self._hidden.row_bytes

    def count_replays(self, count: int) -> None:
        self._replays += count

    def stopped(self) -> None:
        """A program has stopped at a border; when this returns, it goes on."""
        self._stops += 1
        if self.on_stop is None:
            # Nobody waits for the machine: whoever asked has gone.
            self.control.stop = 0
        else:
            self.on_stop(self.control.finished_layers)

    def _run(self, program: Program, step: int | None, rows: int, carry: int) -> None:
        self._position.value = 0
        self._replays += 1
        while True:
            code = self.library.xn_program_run(
                self.pool, program.ptr, program.num_nodes, step, rows, self.arena.ptr, carry,
                self._control_ptr if step is not None else None, self._stamps if step is not None else None,
                self._position_ptr,
            )  # fmt: skip
            if code != STOPPED:
                check(code)
                return
            self.stopped()

    def step_program(self, rows: int) -> Program | None:
        """None = beyond every bucket. A new program may make the arena grow."""
        if rows > BUCKETS[-1]:
            return None
        bucket = BUCKETS[bisect_left(BUCKETS, rows)]
        program = self._steps.get(bucket)
        if program is None:
            program = self._steps[bucket] = Program(self._forward, bucket, self._hidden)
            self.arena.fit(program.arena_bytes)
        return program

    def head_program(self, rows: int) -> Program:
        """As above; at most as many rows as the last bucket has."""
        bucket = BUCKETS[bisect_left(BUCKETS, rows)]
        program = self._heads.get(bucket)
        if program is None:
            program = self._heads[bucket] = Program(self._head, bucket, self._source)
            self.arena.fit(program.arena_bytes)
        return program

    def logits_of(self, program: Program) -> F32:
        """What a head's program leaves in the arena, as an array; valid until the arena grows."""
        size = program.max_rows * program.width
        flat = self.arena.array[program.result_at : program.result_at + 4 * size].view(np.float32)
        return flat.reshape(program.max_rows, program.width)


def flatten(sequences: Sequence[SequencePlan], num_groups: int) -> tuple[array[int], int, int]:
    """(the words of `xn_step_set`, rows, rows that yield logits)."""
    heads: list[int] = []
    tokens: list[int] = []
    tables: list[list[int]] = [[] for _ in range(num_groups)]
    skipped = 0
    for sequence in sequences:
        heads += (len(sequence.tokens), sequence.start, sequence.first_logit_row)
        skipped += sequence.first_logit_row
        tokens += sequence.tokens
        for table, pages in zip(tables, sequence.pages, strict=True):
            heads.append(len(pages))
            table += pages
    words = array("q", heads)
    words.extend(tokens)
    for table in tables:
        words.extend(table)
    return words, len(tokens), len(tokens) - skipped


def _fused(library: ctypes.CDLL, recording: Recording) -> Recording:
    def stride(matrix: Matrix) -> int:
        return int(library.xn_rounded_stride(matrix.ptr))

    return fuse(recording, stride)
