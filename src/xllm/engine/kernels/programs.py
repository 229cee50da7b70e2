"""What a platform may offer the runner beside eager operations: recorded programs of a loaded model.

Contracts only. A platform whose backend cannot record offers none, and the runner calls op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from xllm.engine.kernels.ops import F32, Batch, Buffer, Ops
from xllm.engine.plan import PageCopy, SequencePlan
from xllm.engine.sampling.drawing import Drawn, SampleRow
from xllm.types import KVLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramCounters:
    """`captures`: programs made, `replays`: programs run, `eager`: steps beyond every bucket, `stops`: how
    often a step stopped at a layer's end. The buckets are those that were used. `operations` of a
    step and its head, `max_rows` of the largest bucket there may be."""

    captures: int
    replays: int
    eager: int
    stops: int
    arena_bytes: int
    row_buckets: tuple[int, ...]
    logit_buckets: tuple[int, ...]
    operations: int
    max_rows: int


class StepPrograms(Protocol):
    """Same bits as the eager operations. Owned by the step thread, but for what says otherwise."""

    @property
    def counters(self) -> ProgramCounters: ...

    @property
    def finished_layers(self) -> int:
        """Of the program that runs; any thread may ask."""

    def forget_layers(self) -> None:
        """Between two programs: `finished_layers` is 0 until the next one has finished a layer."""

    def trace_layers(self, on: bool) -> None:
        """Between two steps: fill `layer_stamps` from now on, or no more."""

    @property
    def began_s(self) -> float:
        """When the last forward pass began, on the monotonic clock."""

    @property
    def layer_stamps(self) -> tuple[int, ...]:
        """When the last step began and its layers ended, in ns of the monotonic clock; () unless asked."""

    def forward(self, sequences: Sequence[SequencePlan]) -> Buffer | None:
        """The hidden states of the rows that yield logits, in order; they stay until the next call.
        None: the step has to be run eagerly, and nothing was done."""

    def head(self, hidden: Buffer, first: int, count: int) -> F32 | None:
        """Logits of rows first … first + count − 1; they stay until the next call. None: as above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What there is to record of a model. `pages` per KV group of `layout`."""

    forward: Callable[[Ops, Batch], Buffer]
    head: Callable[[Ops, Buffer], Buffer]
    pages: tuple[Buffer, ...]
    layout: KVLayout
    num_heads: int


MakePrograms = Callable[[LoadedModel], StepPrograms]


class Pending(NamedTuple):
    """The id in row `row` of a step is the token-th of those that the step before has drawn."""

    row: int
    token: int


class Slice(NamedTuple):
    """`num_rows` consecutive rows that yield logits, and what is drawn from them. `asks`: by the caller."""

    num_rows: int
    rows: Sequence[SampleRow]
    asks: bool


class StepJob(Protocol):
    """A step under way. The oldest one is waited for: `logits` and `go_on` for each slice that asks, in
    order, then `finish`. These raise what the forward pass raises; the step is over then."""

    def logits(self) -> F32 | None:
        """Of the next slice that asks, cut to the vocabulary; until `go_on` the step rests.
        None: it is over, and nothing of it was run, because the step before it failed."""

    def go_on(self, first: int, tokens: Sequence[int]) -> None:
        """These were drawn, where those of the slice begin: the `first` is counted over all slices."""

    def give_up(self) -> None:
        """It rests, and the caller fails: the step is over."""

    def finish(self) -> bool:
        """Wait for the end. False: as None above."""

    def drawn(self, index: int) -> list[Drawn]:
        """Of a slice that does not ask."""

    @property
    def began_s(self) -> float: ...

    @property
    def ended_s(self) -> float: ...


class StepJobs(Protocol):
    """Runs steps in order on a thread of its own: at most two are under way, and the second begins when the
    first one ends. Same bits as `StepPrograms`, which is not called while a step is under way."""

    def submit(
        self,
        sequences: Sequence[SequencePlan],
        copies: Sequence[PageCopy],
        slices: Sequence[Slice],
        vocab: int,
        pending: Sequence[Pending] = (),
        before: StepJob | None = None,
    ) -> StepJob | None:
        """`pending` are drawn by `before`. None: beyond every bucket, and nothing was done."""

    def close(self) -> None:
        """What is under way ends soon; idempotent."""


MakeJobs = Callable[[StepPrograms], StepJobs]
