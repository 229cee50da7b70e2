"""Running a step again after a failure: every innocent sequence gets what it would have got."""

from __future__ import annotations

import msgspec
import pytest

from xllm.engine.executor import InProcExecutor
from xllm.engine.plan import (
    PENDING,
    ChoiceTokens,
    PageCopy,
    SampledToken,
    SampleOp,
    SequencePlan,
    SequenceResult,
    StepPlan,
    StepResult,
)
from xllm.errors import InternalError, RequestError
from xllm.types import SamplingParams


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


def drawing(seq_id: int, start: int, token: int) -> SequencePlan:
    """One row that draws; PENDING in place of the token where the step before it draws that."""
    params = SamplingParams(presence_penalty=1.0)
    return SequencePlan(
        seq_id=seq_id,
        start=start,
        tokens=(token,),
        pages=((seq_id,),),
        first_logit_row=0,
        sample=SampleOp(params=params, seed=0, choices=(0,), offset=start, output=tuple(range(start))),
        pending=token == PENDING,
    )


class Counting:
    """Draws seq_id * 100 + position; fails every joint step that `failing` is in, once."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.asked: list[SequencePlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        if len(plan.sequences) > 1 and any(s.seq_id == self.failing for s in plan.sequences):
            self.failing = None
            raise ValueError("injected")
        self.asked.extend(plan.sequences)
        return StepResult(step=plan.step, sequences=tuple(self.draw(s) for s in plan.sequences))

    @staticmethod
    def draw(entry: SequencePlan) -> SequenceResult:
        token = SampledToken(token_id=entry.seq_id * 100 + entry.start)
        return SequenceResult(seq_id=entry.seq_id, choices=(ChoiceTokens(choice=0, tokens=(token,)),))

    def close(self) -> None:
        return


class Queued(Counting):
    """A runner with a queue of its own, which knows pending tokens; what fails stops it."""

    def __init__(self, failing: int | None = None) -> None:
        super().__init__(failing)
        self.plans: list[StepPlan] = []
        self.failed = False

    def submit(self, plan: StepPlan) -> None:
        assert len(self.plans) < 2
        self.plans.append(plan)

    def collect(self) -> StepResult:
        plan = self.plans.pop(0)
        if self.failed:
            self.failed = bool(self.plans)
            return StepResult(step=plan.step, sequences=(), dropped=True)
        try:
            return super().execute(plan)
        except ValueError:
            self.failed = bool(self.plans)
            raise

    def execute(self, plan: StepPlan) -> StepResult:
        assert not self.plans, "the queue has something under way"
        return super().execute(plan)


def two_steps() -> tuple[StepPlan, StepPlan]:
    return (
        StepPlan(step=1, sequences=(drawing(1, 3, 7), drawing(2, 5, 8))),
        StepPlan(step=2, sequences=(drawing(1, 4, PENDING), drawing(2, 6, PENDING))),
    )


def test_pending_tokens_are_those_of_the_step_before_with_their_history() -> None:
    runner = Counting()
    executor = InProcExecutor(runner, lookahead=True)
    for plan in two_steps():
        executor.submit(plan)
    assert executor.depth == 2
    assert [executor.collect().step for _ in range(2)] == [1, 2]
    asked = runner.asked[2:]
    assert [(s.tokens, s.pending) for s in asked] == [((103,), False), ((205,), False)]
    assert [s.sample.output for s in asked if s.sample] == [(0, 1, 2, 3, 103), (0, 1, 2, 3, 4, 5, 205)]


@pytest.mark.parametrize("runner_type", [Counting, Queued])
def test_what_was_handed_over_behind_a_step_that_failed_is_dropped(runner_type: type[Counting]) -> None:
    runner = runner_type(failing=2)
    executor = InProcExecutor(runner, lookahead=True)
    for plan in two_steps():
        executor.submit(plan)
    first, second = executor.collect(), executor.collect()
    assert first.rerun
    assert [s.choices[0].tokens[0].token_id for s in first.sequences] == [103, 205]
    assert second == StepResult(step=2, sequences=(), dropped=True)
    executor.submit(two_steps()[0])
    assert not executor.collect().dropped


@pytest.mark.parametrize("runner_type", [Counting, Queued])
def test_a_step_that_is_run_in_parts_knows_its_pending_tokens(runner_type: type[Counting]) -> None:
    runner = runner_type()
    executor = InProcExecutor(runner, lookahead=True)
    one, two = two_steps()
    executor.submit(one)
    executor.submit(two)
    executor.collect()
    runner.failing = 1
    assert executor.collect().rerun
    assert [s.tokens for s in runner.asked[-2:]] == [(103,), (205,)]


def test_no_more_steps_are_taken_than_may_be_under_way() -> None:
    executor = InProcExecutor(Counting())
    executor.submit(two_steps()[0])
    with pytest.raises(InternalError):
        executor.submit(two_steps()[1])
    with pytest.raises(InternalError):
        executor.execute(two_steps()[1])
