"""The microbenchmark drives the runner as an engine would: whole prompts once, then one row a step."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import native_step
from xllm.engine.plan import ChoiceTokens, SampledToken, SequenceResult, StepPlan, StepResult
from xllm.errors import ErrorInfo
from xllm.types import PAGE_SIZE


class Runner:
    """Answers every sequence with token 7 and keeps the plans."""

    def __init__(self, error: ErrorInfo | None = None) -> None:
        self.plans: list[StepPlan] = []
        self.error = error

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        choices = (ChoiceTokens(0, (SampledToken(7),)),)
        results = [SequenceResult(seq_id=s.seq_id, choices=choices, error=self.error) for s in plan.sequences]
        return StepResult(step=plan.step, sequences=tuple(results))


def test_a_decode_step_computes_one_row_of_every_sequence_at_the_next_position() -> None:
    runner = Runner()
    assert native_step.decode(runner, vocab=100, num=16, repeats=1) > 0
    prompts, steps = runner.plans[:2], runner.plans[2:]
    assert [len(s.tokens) for plan in prompts for s in plan.sequences] == [native_step.CONTEXT_LEN] * 16
    assert len(steps) == native_step.NUM_STEPS
    for number, plan in enumerate(steps):
        assert [s.tokens for s in plan.sequences] == [(7,)] * 16
        assert {s.start for s in plan.sequences} == {native_step.CONTEXT_LEN + number}
        assert {s.first_logit_row for s in plan.sequences} == {0}


def test_no_two_sequences_share_a_page_and_pages_cover_every_row() -> None:
    runner = Runner()
    native_step.decode(runner, vocab=100, num=64, repeats=1)
    last = runner.plans[-1].sequences
    pages = [page for s in last for page in s.pages[0]]
    assert len(pages) == len(set(pages))
    assert all(len(s.pages[0]) * PAGE_SIZE >= s.start + len(s.tokens) for s in last)


def test_a_prefill_computes_whole_prompts_in_one_step_and_one_row_of_logits_each() -> None:
    runner = Runner()
    native_step.prefill(runner, vocab=100, num=8, length=128, repeats=2)
    assert [plan.num_rows for plan in runner.plans] == [1024] * 3
    assert {s.first_logit_row for s in runner.plans[0].sequences} == {127}


def test_a_step_that_failed_is_no_measurement() -> None:
    error = ErrorInfo(kind="InternalError", code="internal_error", message="broken")
    with pytest.raises(Exception, match="broken"):
        native_step.step(Runner(error), native_step.sequences(np.random.default_rng(0), 1, 8, 100))
