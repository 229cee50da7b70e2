"""QueuedRunner: a `ModelRunner` that takes the next step while one runs (`platform.base.StepQueue`).

Decides which part of a step the queue can do alone and does the rest when it is collected. What must not live
here: how a slice of logits is used (`runner`), how a native step comes about (`kernels.native.queue`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from xllm.arch import ArchConfig
from xllm.engine.kernels.ops import Backend
from xllm.engine.kernels.programs import Slice, StepJob, StepJobs
from xllm.engine.model.definition import LoadedWeights, ModelDefinition
from xllm.engine.plan import StepPlan, StepResult
from xllm.engine.runner.batch import LogitPiece, logit_slices
from xllm.engine.runner.partial import Partial, draws_of
from xllm.engine.runner.pending import open_places, resolved
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler, plainly
from xllm.errors import InternalError
from xllm.types import KVLayout

log = logging.getLogger(__name__)

_DEPTH = 2


class _Step:
    """A plan under way. Without a `job` it has not begun: it waits for the one before, or runs op by op."""

    __slots__ = ("draws", "error", "is_dropped", "job", "pieces", "plan", "slices")

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.job: StepJob | None = None
        self.error: Exception | None = None
        self.is_dropped = False
        self.pieces: list[list[LogitPiece]] = []
        self.draws: list[list[int]] = []  # of each slice, by index of the sequence
        self.slices: list[Slice] = []

    def places(self) -> dict[int, int]:
        """Where among the drawn tokens each sequence's first one goes, by seq_id."""
        found: dict[int, int] = {}
        first = 0
        for indices, part in zip(self.draws, self.slices, strict=True):
            for index, row in zip(indices, part.rows, strict=True):
                found[self.plan.sequences[index].seq_id] = first
                first += len(row.op.choices)
        return found


class QueuedRunner(ModelRunner):
    """Called by the step thread only. Without `use_queue` every step runs when it is collected."""

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
        super().__init__(model, arch, weights, ops, layout, num_pages, sampler, numerics)
        self._jobs: StepJobs | None = None
        self._under_way: deque[_Step] = deque()

    def use_queue(self, jobs: StepJobs) -> None:
        self._jobs = jobs

    def execute(self, plan: StepPlan) -> StepResult:
        if self._under_way:
            raise InternalError("a step cannot be executed while others are under way")
        return super().execute(plan)

    def submit(self, plan: StepPlan) -> None:
        under_way = self._under_way
        if len(under_way) == _DEPTH:
            raise InternalError("two steps are under way already")
        before = under_way[-1] if under_way else None
        under_way.append(step := _Step(plan))
        if before is None or before.job is not None:
            self._begin(step, before)

    def collect(self) -> StepResult:
        if not self._under_way:
            raise InternalError("no step is under way")
        step = self._under_way[0]
        result: StepResult | None = None
        try:
            result = self._result(step)
        finally:
            self._under_way.popleft()
            if self._under_way:
                self._after(self._under_way[0], result)
        return result

    def close(self) -> None:
        if self._jobs is not None:
            self._jobs.close()
            self._jobs = None
        self._under_way.clear()
        super().close()

    def _begin(self, step: _Step, before: _Step | None) -> None:
        """Hand it to the queue, if that can run it; what goes wrong is told when it is collected."""
        if self._jobs is None or self.programs is None:
            return
        try:
            self._cut(step)
            pending = open_places(step.plan.sequences, {} if before is None else before.places())
            # Before the step that runs has ended: pages new to this plan are nobody's in that one.
            self._zero_new_pages(step.plan)
            step.job = self._jobs.submit(
                step.plan.sequences,
                step.plan.copies,
                step.slices,
                self._arch.vocab_size,
                pending,
                None if before is None else before.job,
            )
        except Exception as error:
            log.warning("step %d could not be handed over", step.plan.step, exc_info=True)
            step.error = error

    def _cut(self, step: _Step) -> None:
        """Cut the logits into slices; what a drawer alone cannot finish is asked of us, at `collect`."""
        sequences, vocab = step.plan.sequences, self._arch.vocab_size
        for pieces in logit_slices(sequences):
            draws = draws_of(sequences, pieces)
            rows = [row for _, row in draws]
            seen = self.logits_tap is not None or any(
                sequences[p.index].prompt_logprobs is not None for p in pieces
            )
            plain = None if seen else self._sampler.plain_rows(rows, vocab)
            step.pieces.append(pieces)
            step.draws.append([index for index, _ in draws])
            count = sum(p.count for p in pieces)
            step.slices.append(Slice(count, rows if plain is None else plain, plain is None))

    def _result(self, step: _Step) -> StepResult:
        if step.is_dropped:
            return _dropped(step.plan)
        if step.error is not None:
            raise step.error
        if step.job is None:
            return super().execute(step.plan)
        self._num_forwards += bool(step.plan.sequences)
        result = self._finish(step, step.job)
        if result.dropped:
            self._num_forwards -= bool(step.plan.sequences)
        return result

    def _finish(self, step: _Step, job: StepJob) -> StepResult:
        results = [Partial(s) for s in step.plan.sequences]
        first = 0
        for indices, pieces, part in zip(step.draws, step.pieces, step.slices, strict=True):
            if part.asks:
                logits = job.logits()
                if logits is None:
                    return _dropped(step.plan)
                try:
                    self._sample(results, pieces, logits)
                except BaseException:
                    job.give_up()
                    raise
                job.go_on(first, _tokens([results[i] for i in indices], part))
            first += sum(len(row.op.choices) for row in part.rows)
        if not job.finish():
            return _dropped(step.plan)
        for i, (indices, part) in enumerate(zip(step.draws, step.slices, strict=True)):
            if not part.asks:
                for index, row, drawn in zip(indices, part.rows, job.drawn(i), strict=True):
                    results[index].take(plainly(row.op, drawn))
        return StepResult(
            step=step.plan.step,
            sequences=tuple(r.result() for r in results),
            began_s=job.began_s,
            ended_s=job.ended_s,
        )

    def _after(self, step: _Step, before: StepResult | None) -> None:
        """The step before this one is over. None: it failed."""
        if before is None or before.dropped:
            step.is_dropped = step.job is None  # the queue drops its own
            return
        if step.job is None and step.error is None:
            step.plan = resolved(step.plan, before)
            self._begin(step, None)
        elif any(part.asks for part in step.slices):
            step.plan = resolved(step.plan, before)  # what we draw may need the history


def _dropped(plan: StepPlan) -> StepResult:
    return StepResult(step=plan.step, sequences=(), dropped=True)


def _tokens(results: Sequence[Partial], part: Slice) -> list[int]:
    """What was drawn for each choice of each row; the id 0, which may be read, where a row failed."""
    found: list[int] = []
    for partial, row in zip(results, part.rows, strict=True):
        drawn = [choice.tokens[0].token_id for choice in partial.choices]
        found += drawn if partial.error is None else [0] * len(row.op.choices)
    return found
