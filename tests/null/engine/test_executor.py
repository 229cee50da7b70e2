"""Running a step again after a failure: every innocent sequence gets what it would have got."""

from __future__ import annotations

import msgspec

from xllm.engine.executor import InProcExecutor
from xllm.engine.plan import PageCopy, SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.errors import RequestError


def entry(seq_id: int) -> SequencePlan:
    return SequencePlan(seq_id=seq_id, start=0, tokens=(1,), pages=((seq_id,),), first_logit_row=1)


class Flaky:
    """Fails a joint step, and sequence 1 on its own; remembers what it was asked."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        ids = tuple(s.seq_id for s in plan.sequences)
        self.asked.append((ids, len(plan.copies)))
        if 1 in ids:
            raise self.error
        return StepResult(step=plan.step, sequences=tuple(SequenceResult(seq_id=i) for i in ids))

    def close(self) -> None:
        return


PLAN = StepPlan(
    step=1, sequences=(entry(0), entry(1), entry(2)), copies=(PageCopy(0, 5, 6), PageCopy(0, 7, 8))
)


def test_only_the_culprit_gets_the_error() -> None:
    result = InProcExecutor(Flaky(ValueError("secret"))).execute(PLAN)
    assert [(r.seq_id, r.error is None) for r in result.sequences] == [(0, True), (1, False), (2, True)]
    assert "secret" not in result.sequences[1].error.message


def test_a_known_error_is_kept() -> None:
    result = InProcExecutor(Flaky(RequestError("no token", code="no_token_allowed"))).execute(PLAN)
    assert result.sequences[1].error.code == "no_token_allowed"


def test_copies_run_once_and_before_any_row() -> None:
    runner = Flaky(ValueError("x"))
    InProcExecutor(runner).execute(PLAN)
    assert runner.asked[0] == ((), 2)
    assert [num_copies for _, num_copies in runner.asked[1:]] == [0, 0, 0, 0]


def test_a_step_without_failure_is_run_once() -> None:
    runner = Flaky(ValueError("x"))
    plan = msgspec.structs.replace(PLAN, sequences=(entry(0), entry(2)), copies=())
    InProcExecutor(runner).execute(plan)
    assert runner.asked == [((0, 2), 0)]
