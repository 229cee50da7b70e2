"""Steps of recorded programs on a thread of the library's own: the next is handed over while one runs.

Implements `kernels.programs.StepJobs` over `xn_queue`. Owns what two steps under way do not share; arena,
carry and control are those of `Programs`. What must not live here: what a row asks of the sampler, tokens' fate.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

from xllm.engine.kernels.native.handles import Array
from xllm.engine.kernels.native.library import ASKS, DROPPED, STOPPED, check
from xllm.engine.kernels.native.programs import Programs, flatten
from xllm.engine.kernels.native.sampling import encode_rows, outcomes
from xllm.engine.kernels.native.structs import CopyStruct, JobStruct, PendingStruct, SliceStruct
from xllm.engine.kernels.ops import F32
from xllm.engine.kernels.programs import Pending, Slice, StepJob
from xllm.engine.plan import PageCopy, SequencePlan
from xllm.engine.sampling.drawing import Drawn
from xllm.errors import InternalError

_DEPTH = 2
_GIVEN_UP = 2
"""The code that a job ends with when what the caller does for it fails; any but 0 and DROPPED would do."""


class NativeJob:
    """Holds all that the native job points to; whoever comes behind it holds it, for its tokens."""

    __slots__ = ("_asking", "_held", "_queue", "slices", "stamps", "status", "struct", "tokens")

    def __init__(self, queue: NativeQueue, slices: Sequence[Slice], num_tokens: int) -> None:
        self._queue = queue
        self.slices = slices
        self.struct = JobStruct()
        # Zero is an id that may be read, whatever happens to the rows.
        self.tokens: Any = (c_int64 * num_tokens)()
        self.status: list[Any] = [(c_int32 * len(s.rows))() for s in slices]
        self.stamps: Any = None
        self._held: list[object] = []
        self._asking: deque[F32] = deque()

    def hold(self, owned: Any) -> Any:
        """Keep what the struct points to as long as the job."""
        self._held.append(owned)
        return owned

    def asks_with(self, logits: F32) -> None:
        self._asking.append(logits)

    def logits(self) -> F32 | None:
        return None if self._queue.wait_for(self, ASKS) == DROPPED else self._asking.popleft()

    def go_on(self, first: int, tokens: Sequence[int]) -> None:
        self.tokens[first : first + len(tokens)] = tokens
        self._queue.go_on(0)

    def give_up(self) -> None:
        self._queue.give_up(self)

    def finish(self) -> bool:
        return self._queue.wait_for(self, 0) != DROPPED

    def drawn(self, index: int) -> list[Drawn]:
        first = sum(len(r.op.choices) for s in self.slices[:index] for r in s.rows)
        rows = self.slices[index].rows
        count = sum(len(r.op.choices) for r in rows)
        return outcomes(rows, self.tokens[first : first + count], self.status[index][:])

    @property
    def began_s(self) -> float:
        return float(self.struct.began_ns) / 1e9

    @property
    def ended_s(self) -> float:
        return float(self.struct.ended_ns) / 1e9


class NativeQueue:
    """Called by the step thread. While a job rests or none is under way, the pool is the step thread's."""

    def __init__(self, programs: Programs) -> None:
        library = programs.library
        self._programs = programs
        self._lib = library
        self._steps = [programs.new_step() for _ in range(_DEPTH)]
        self._queue: int | None = library.xn_queue_create(programs.pool)
        if self._queue is None:
            raise InternalError("the native queue could not be started")
        # Its thread reads what the jobs hold, so these are ours until it has ended.
        self._under_way: deque[NativeJob] = deque()
        self._end = weakref.finalize(self, library.xn_queue_destroy, self._queue)
        self._num_submitted = 0
        self._workspace = np.empty(0, dtype=np.uint8)
        self._vocab = 0

    def submit(
        self,
        sequences: Sequence[SequencePlan],
        copies: Sequence[PageCopy],
        slices: Sequence[Slice],
        vocab: int,
        pending: Sequence[Pending] = (),
        before: StepJob | None = None,
    ) -> NativeJob | None:
        job = NativeJob(self, slices, sum(len(r.op.choices) for s in slices for r in s.rows))
        struct = job.struct
        struct.copies, struct.num_copies = self._copies(job, copies), len(copies)
        if sequences and not self._fill_step(job, sequences):
            return None
        self._fill_slices(job, vocab)
        if pending:
            opened = job.hold((PendingStruct * len(pending))(*(PendingStruct(*p) for p in pending)))
            struct.pending, struct.num_pending = ctypes.addressof(opened), len(pending)
            if isinstance(before, NativeJob):
                struct.drawn = ctypes.addressof(job.hold(before.tokens))
                struct.num_drawn = len(before.tokens)
        check(self._lib.xn_queue_submit(self._queue, ctypes.addressof(struct)))
        self._under_way.append(job)
        self._num_submitted += 1
        return job

    def wait_for(self, job: NativeJob, expected: int) -> int:
        """Until the job rests with `expected`, or has ended well or was dropped; raises how else it ended."""
        if not self._under_way or self._under_way[0] is not job:
            raise InternalError("steps are collected in the order in which they were submitted")
        while (code := self._lib.xn_queue_wait(self._queue)) == STOPPED:
            try:
                self._programs.stopped()
            except BaseException:
                self.give_up(job)
                raise
            self.go_on(0)
        if code == ASKS:
            if code != expected:
                raise InternalError("a step asks for tokens that nobody is to draw")
            return int(code)
        self._under_way.popleft()
        if job.stamps is not None and code == 0:
            self._programs.layer_stamps = tuple(job.stamps)
        if code != DROPPED:
            check(code)
        return int(code)

    def go_on(self, code: int) -> None:
        check(self._lib.xn_queue_go_on(self._queue, code))

    def give_up(self, job: NativeJob) -> None:
        """The job rests and cannot go on: it fails, and the one behind it is dropped."""
        self.go_on(_GIVEN_UP)
        self._lib.xn_queue_wait(self._queue)
        self._under_way.remove(job)

    def close(self) -> None:
        """A running step ends at its next layer; idempotent."""
        control = self._programs.control
        stop, control.stop = control.stop, 1
        self._end()
        control.stop = stop
        self._under_way.clear()

    def _copies(self, job: NativeJob, copies: Sequence[PageCopy]) -> int | None:
        if not copies:
            return None
        made = job.hold((CopyStruct * len(copies))())
        for struct, copy in zip(made, copies, strict=True):
            pages = self._programs.pages[copy.group]
            size = pages.array.shape[1]
            if not (0 <= copy.src < len(pages.array) and 0 <= copy.dst < len(pages.array)):
                raise InternalError("a page to copy does not exist")
            struct.to, struct.from_ = pages.ptr + copy.dst * size, pages.ptr + copy.src * size
            struct.bytes = size
        return ctypes.addressof(made)

    def _fill_step(self, job: NativeJob, sequences: Sequence[SequencePlan]) -> bool:
        programs, struct = self._programs, job.struct
        words, num_rows, num_logit_rows = flatten(sequences, len(programs.pages))
        program = programs.step_program(num_rows)
        if program is None:
            return False
        step = self._steps[self._num_submitted % _DEPTH]
        address, count = words.buffer_info()
        check(self._lib.xn_step_set(step, address, count, len(sequences)))
        programs.carry.fit(num_logit_rows * programs.hidden_bytes)
        struct.step, struct.nodes, struct.num_nodes = step, program.ptr, program.num_nodes
        struct.control = ctypes.addressof(programs.control)
        job.hold(program)
        job.stamps = programs.new_stamps()
        struct.stamps = None if job.stamps is None else ctypes.addressof(job.stamps)
        return True

    def _fill_slices(self, job: NativeJob, vocab: int) -> None:
        programs, struct = self._programs, job.struct
        heads = [programs.head_program(s.num_rows) for s in job.slices]
        programs.count_replays(1 + len(heads))
        # Every program is made, so the arena grows no more for this job; another job's may be another.
        struct.arena, struct.carry = programs.arena.ptr, programs.carry.ptr
        job.hold(programs.arena.array)
        job.hold(programs.carry.array)
        made = job.hold((SliceStruct * len(heads))())
        choices: list[int] = []
        first = 0
        for slot, part, head, status in zip(made, job.slices, heads, job.status, strict=True):
            logits = programs.logits_of(job.hold(head))
            draws, more = encode_rows(
                logits.ctypes.data, logits.strides[0], vocab, part.rows, {}, len(choices)
            )
            choices += more
            slot.nodes, slot.num_nodes, slot.num_rows = head.ptr, head.num_nodes, part.num_rows
            slot.hidden = programs.carry.ptr + first * programs.hidden_bytes
            slot.draws, slot.num_draws = _address(job.hold(draws)), len(part.rows)
            slot.status, slot.asks = ctypes.addressof(status), int(part.asks)
            if part.asks:
                job.asks_with(logits[: part.num_rows, :vocab])
            first += part.num_rows
        struct.slices, struct.num_slices = ctypes.addressof(made), len(heads)
        struct.choices = ctypes.addressof(job.hold((ctypes.c_uint32 * len(choices))(*choices)))
        struct.tokens, struct.vocab = ctypes.addressof(job.tokens), vocab
        struct.workspace = job.hold(self._room(vocab)).ctypes.data

    def _room(self, vocab: int) -> Array:
        if vocab != self._vocab:
            self._workspace = np.empty(self._lib.xn_sample_bytes(self._programs.pool, vocab), dtype=np.uint8)
            self._vocab = vocab
        return self._workspace


def _address(data: bytes) -> int | None:
    return ctypes.cast(ctypes.c_char_p(data), c_void_p).value
