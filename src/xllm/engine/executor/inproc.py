"""Runs steps on one runner in this process, and keeps one sequence's failure from the others.

A step that raises is run again sequence by sequence: results do not depend on company, so the
innocent get exactly what the joint step would have given them. What was handed over behind it is dropped.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Protocol

import msgspec

from xllm.clock import Clock
from xllm.engine.executor.pending import fill_in, left_out
from xllm.engine.plan import SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.platform.base import StepQueue
from xllm.errors import ErrorInfo, InternalError, XllmError

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...


class InProcExecutor:
    """With `lookahead` a step may be submitted while one is under way. A runner that is a `StepQueue` has it
    run right behind that one; with any other runner each step is run when it is collected, so that the policy
    is the same and nothing is gained. `clock` stamps steps whose runner does not.
    """

    def __init__(self, runner: StepRunner, *, lookahead: bool = False, clock: Clock | None = None) -> None:
        self._runner = runner
        self._queue: StepQueue | None = runner if lookahead and isinstance(runner, StepQueue) else None
        self._clock = clock
        self._plans: deque[StepPlan] = deque()
        self._num_dropped = 0
        self._before: StepResult | None = None
        self.depth = 2 if lookahead else 1

    def submit(self, plan: StepPlan) -> None:
        if len(self._plans) >= self.depth:
            raise InternalError("more steps were submitted than may be under way")
        self._plans.append(plan)
        if self._queue is not None:
            self._queue.submit(plan)

    def collect(self) -> StepResult:
        plan = self._plans.popleft()
        if self._num_dropped:
            self._num_dropped -= 1
            return StepResult(step=plan.step, sequences=(), dropped=True)
        result = self._run(plan) if self._queue is None else self._collect(self._queue, plan)
        if result.rerun:
            self._num_dropped = len(self._plans)
        self._before = result if self._plans else None
        return result

    def execute(self, plan: StepPlan) -> StepResult:
        if self._plans:
            raise InternalError("a step was to be run on its own while others are under way")
        return self._run(plan)

    def close(self) -> None:
        self._runner.close()

    def _collect(self, queue: StepQueue, plan: StepPlan) -> StepResult:
        """What the queue has made of it. Its copies are made whatever becomes of its rows."""
        try:
            result = queue.collect()
        except Exception:
            for _ in self._plans:
                queue.collect()  # dropped; the runner is ours again
            filled = fill_in(plan, self._before)
            return self._one_by_one(plan, filled)
        if result.elapsed_ms == 0.0:
            result = msgspec.structs.replace(result, elapsed_ms=(result.ended_s - result.began_s) * 1000)
        return result

    def _run(self, plan: StepPlan) -> StepResult:
        began_s = 0.0 if self._clock is None else self._clock.monotonic_s()
        started = time.perf_counter()
        filled = fill_in(plan, self._before)
        if plan.copies:
            # On their own, and once: a source may be overwritten by this very step's rows, so a
            # second run of the sequences must not copy again.
            self._runner.execute(msgspec.structs.replace(plan, sequences=()))
            filled = msgspec.structs.replace(filled, copies=())
        try:
            result = self._runner.execute(filled)
            result = self._with(result, left_out(plan, filled))
        except Exception:
            result = self._one_by_one(plan, filled)
        result = msgspec.structs.replace(result, elapsed_ms=(time.perf_counter() - started) * 1000)
        if self._clock is None or result.ended_s:
            return result
        return msgspec.structs.replace(result, began_s=began_s, ended_s=self._clock.monotonic_s())

    @staticmethod
    def _with(result: StepResult, more: tuple[SequenceResult, ...]) -> StepResult:
        return msgspec.structs.replace(result, sequences=(*result.sequences, *more)) if more else result

    def _one_by_one(self, plan: StepPlan, filled: StepPlan) -> StepResult:
        log.exception("step %d failed; running its %d sequences one by one", plan.step, len(plan.sequences))
        results: list[SequenceResult] = []
        for sequence in filled.sequences:
            results.extend(self._alone(filled, sequence))
        return StepResult(step=plan.step, sequences=(*results, *left_out(plan, filled)), rerun=True)

    def _alone(self, plan: StepPlan, sequence: SequencePlan) -> tuple[SequenceResult, ...]:
        part = msgspec.structs.replace(plan, sequences=(sequence,), copies=())
        try:
            return self._runner.execute(part).sequences
        except XllmError as error:
            return (SequenceResult(seq_id=sequence.seq_id, error=error.info()),)
        except Exception:
            log.exception("sequence %d failed on its own", sequence.seq_id)
            return (SequenceResult(seq_id=sequence.seq_id, error=_STEP_FAILED),)


_STEP_FAILED = ErrorInfo(
    kind="InternalError", code="internal_error", message="the engine failed to compute this request"
)
