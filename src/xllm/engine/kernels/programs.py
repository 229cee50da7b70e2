"""What a platform may offer the runner beside eager operations: recorded programs of a loaded model.

Contracts only. A platform whose backend cannot record offers none, and the runner calls op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xllm.engine.kernels.ops import F32, Batch, Buffer, Ops
from xllm.engine.plan import SequencePlan
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
    def layer_stamps(self) -> tuple[int, ...]:
        """When the last step began and each of its layers ended, in ns of the monotonic clock; () unless asked."""

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
