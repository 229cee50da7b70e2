"""Runs steps on one runner in this process, and keeps one sequence's failure from the others.

A step that raises is run again sequence by sequence: results do not depend on company, so the
innocent get exactly what the joint step would have given them.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

import msgspec

from xllm.engine.plan import SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.errors import ErrorInfo, XllmError

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...


class InProcExecutor:
    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        if plan.copies:
            # On their own, and once: a source may be overwritten by this very step's rows, so a
            # second run of the sequences must not copy again.
            self._runner.execute(msgspec.structs.replace(plan, sequences=()))
            plan = msgspec.structs.replace(plan, copies=())
        try:
            result = self._runner.execute(plan)
        except Exception:
            log.exception(
                "step %d failed; running its %d sequences one by one", plan.step, len(plan.sequences)
            )
            result = self._one_by_one(plan)
        return msgspec.structs.replace(result, elapsed_ms=(time.perf_counter() - started) * 1000)

    def close(self) -> None:
        self._runner.close()

    def _one_by_one(self, plan: StepPlan) -> StepResult:
        results: list[SequenceResult] = []
        for sequence in plan.sequences:
            results.extend(self._alone(plan, sequence))
        return StepResult(step=plan.step, sequences=tuple(results), rerun=True)

    def _alone(self, plan: StepPlan, sequence: SequencePlan) -> tuple[SequenceResult, ...]:
        part = msgspec.structs.replace(plan, sequences=(sequence,))
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
