"""ModelRunner: copies pages, runs the model, samples. One per loaded model, owned by the step thread.

Only what every model needs; architecture is in `model`, maths in the backend, drawing in `sampling`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from xllm.arch import ArchConfig
from xllm.engine.kernels.ops import F32, Backend, Buffer, KVPages
from xllm.engine.kernels.programs import LoadedModel, MakePrograms, ProgramCounters, StepPrograms
from xllm.engine.kvtransfer.memory import KVMemory, of_layers
from xllm.engine.model.definition import LoadedWeights, ModelDefinition
from xllm.engine.model.layout import layer_places
from xllm.engine.plan import SequencePlan, StepPlan, StepResult
from xllm.engine.runner.batch import LogitPiece, build_batch, logit_slices, new_pages
from xllm.engine.runner.partial import LogitsTap, Partial, draws_of, show
from xllm.engine.sampling import Sampler
from xllm.engine.surviving import SharedPages
from xllm.errors import ErrorInfo, XllmError
from xllm.types import KVLayout

log = logging.getLogger(__name__)

_SAMPLING_FAILED = ErrorInfo(
    kind="InternalError", code="internal_error", message="the engine failed to sample this request"
)


class ModelRunner:
    """Implements `platform.base.Runner`. Pages belong to it, what they mean to the page manager."""

    def __init__(
        self,
        model: ModelDefinition,
        arch: ArchConfig,
        weights: LoadedWeights,
        ops: Backend,
        layout: KVLayout,
        num_pages: Sequence[int],
        sampler: Sampler,
        numerics: tuple[str, ...] = (),
    ) -> None:
        self._model = model
        self._arch = arch
        self._weights = weights
        self._ops = ops
        self._layout = layout
        self._sampler = sampler
        self._numerics = numerics
        groups = tuple(ops.kv_pages(g, n) for g, n in zip(layout.groups, num_pages, strict=True))
        self._kv = KVPages(groups=groups, place=layer_places(layout))
        self._num_forwards = 0
        self._began_s = self._ended_s = 0.0
        self.programs: StepPrograms | None = None
        self.logits_tap: LogitsTap | None = None

    @property
    def kv_layout(self) -> KVLayout:
        return self._layout

    @property
    def deterministic(self) -> bool:
        return self._ops.deterministic

    @property
    def numerics(self) -> tuple[str, ...]:
        return self._numerics

    @property
    def program_counters(self) -> ProgramCounters | None:
        return None if self.programs is None else self.programs.counters

    @property
    def finished_layers(self) -> int:
        programs = self.programs
        return 0 if programs is None else programs.finished_layers

    @property
    def num_forwards(self) -> int:
        return self._num_forwards

    def forget_layers(self) -> None:
        if self.programs is not None:
            self.programs.forget_layers()

    def trace_layers(self, on: bool) -> None:
        """Between two steps: tell in `layer_stamps` when layers end, where steps are replayed."""
        if self.programs is not None:
            self.programs.trace_layers(on)

    def layer_stamps(self) -> tuple[int, ...]:
        """Of the last step that was collected or executed: when its forward pass began and when each of its
        layers was complete, in ns of the monotonic clock; () where nobody told."""
        return () if self.programs is None else self.programs.layer_stamps

    def kv_memory(self, shared: SharedPages | None = None) -> KVMemory | None:
        raw = [self._ops.page_memory(pages) for pages in self._kv.groups]
        known = [pages for pages in raw if pages is not None]
        return of_layers(self._layout, known, shared) if len(known) == len(raw) else None

    def record(self, make: MakePrograms) -> ProgramCounters:
        """Replay from now on what `make` records of the model; raises what it raises."""
        model, arch, weights, kv = self._model, self._arch, self._weights, self._kv
        recordable = LoadedModel(
            forward=lambda ops, batch: model.forward(ops, arch, weights, kv, batch),
            head=lambda ops, hidden: model.head(ops, arch, weights, hidden),
            pages=kv.groups,
            layout=self._layout,
            num_heads=arch.num_heads,
        )
        self.programs = make(recordable)
        return self.programs.counters

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the step; raises only what the forward pass itself raises."""
        results = [Partial(s) for s in plan.sequences]
        self._began_s = self._ended_s = 0.0
        with self._ops.running():
            self._prepare_pages(plan)
            if plan.num_rows:
                self._forward(plan.sequences, results)
        return StepResult(
            step=plan.step,
            sequences=tuple(r.result() for r in results),
            began_s=self._began_s,
            ended_s=self._ended_s,
        )

    def close(self) -> None:
        self.programs = None
        self._kv = KVPages(groups=(), place=())
        self._weights = LoadedWeights(top={}, layers=(), ropes={})

    def _prepare_pages(self, plan: StepPlan) -> None:
        # Copies first: a source may have changed hands and be somebody's new page in this very step.
        for copy in plan.copies:
            self._ops.copy_page(self._kv.groups[copy.group], copy.src, copy.dst)
        self._zero_new_pages(plan)

    def _zero_new_pages(self, plan: StepPlan) -> None:
        for g, pages in enumerate(self._kv.groups):
            self._ops.zero_pages(pages, new_pages(plan.sequences, g))

    def _forward(self, sequences: Sequence[SequencePlan], results: Sequence[Partial]) -> None:
        hidden = self._hidden(sequences)
        first = 0
        for pieces in logit_slices(sequences):
            count = sum(p.count for p in pieces)
            logits = self._logits(hidden, first, count)
            first += count
            self._ended_s = time.monotonic()
            self._sample(results, pieces, logits)

    def _hidden(self, sequences: Sequence[SequencePlan]) -> Buffer:
        self._num_forwards += 1
        if self.programs is not None:
            replayed = self.programs.forward(sequences)
            if replayed is not None:
                self._began_s = self.programs.began_s
                return replayed
        self._began_s = time.monotonic()
        batch = build_batch(sequences, self._layout, self._arch.num_heads, self._ops)
        return self._model.forward(self._ops, self._arch, self._weights, self._kv, batch)

    def _logits(self, hidden: Buffer, first: int, count: int) -> F32:
        """Rows first … first+count−1 of the logits, cut to the vocabulary."""
        if self.programs is not None:
            replayed = self.programs.head(hidden, first, count)
            if replayed is not None:
                return replayed[:, : self._arch.vocab_size]
        padded = -(-count // self._ops.row_multiple) * self._ops.row_multiple
        rows = np.full(padded, first, dtype=np.int64)
        rows[:count] = np.arange(first, first + count)
        taken = self._ops.select_rows(hidden, self._ops.indices(rows))
        logits = self._model.head(self._ops, self._arch, self._weights, taken)
        return self._ops.to_numpy(logits)[:count, : self._arch.vocab_size]

    def _sample(self, results: Sequence[Partial], pieces: Sequence[LogitPiece], logits: F32) -> None:
        """Use a slice of the step's logits; whatever goes wrong in a sequence's part ends that one only."""
        end = 0
        for piece in pieces:
            partial = results[piece.index]
            first, end = end, end + piece.count
            if self.logits_tap is not None:
                show(self.logits_tap, partial.sequence, piece, logits[first:end])
            if partial.error is not None:
                continue
            try:
                partial.score(self._sampler, piece, logits[first:end])
            except XllmError as error:
                partial.error = error.info()
            except Exception:
                log.exception("log-probabilities of sequence %d failed", partial.sequence.seq_id)
                partial.error = _SAMPLING_FAILED
        draws = draws_of([p.sequence for p in results], pieces)
        drawing = [(results[i], row) for i, row in draws if results[i].error is None]
        if not drawing:
            return
        try:
            outcomes = self._sampler.sample_rows(logits, [row for _, row in drawing])
            self._ended_s = time.monotonic()
            for (partial, _), sampled in zip(drawing, outcomes, strict=True):
                partial.take(sampled)
        except Exception:
            log.exception("sampling of a step failed")
            for partial, _ in drawing:
                partial.error = _SAMPLING_FAILED
