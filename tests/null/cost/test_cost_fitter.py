"""The on-line fit: it finds what made the times, stays non-negative, and survives stalls and silence."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.cost import CostFitter, StepCost, attention_work
from xllm.cost.nonnegative import solve_nonnegative

TRUE = StepCost((2.0, 0.1, 0.0005, 0.3, 0.0002))
Work = tuple[int, int, int, int]


def works(rng: random.Random, num: int, *, prefill: bool = True) -> Iterator[Work]:
    """Steps as a scheduler makes them: decoding alone, prompts alone, both."""
    for _ in range(num):
        num_decoding = rng.randint(0, 32)
        rows = rng.choice([0, 0, 64, 200, 512]) if prefill else 0
        if rows + num_decoding == 0:
            num_decoding = 1
        context = attention_work(rng.choice([0, 512, 1500]), rows)
        yield rows, context, num_decoding, sum(rng.randint(50, 2000) for _ in range(num_decoding))


def fit(num: int = 400, noise: float = 0.0, seed: int = 1, true: StepCost = TRUE) -> CostFitter:
    rng = random.Random(seed)
    fitter = CostFitter()
    for work in works(rng, num):
        fitter.observe(*work, true.step_ms(*work) * (1 + rng.gauss(0, noise)))
    return fitter


def worst(cost: StepCost | None, true: StepCost = TRUE) -> float:
    """The largest relative error over steps that were not fitted."""
    assert cost is not None
    rng = random.Random(99)
    return max(abs(cost.step_ms(*w) / true.step_ms(*w) - 1) for w in works(rng, 200))


def test_nothing_is_said_before_enough_varied_steps() -> None:
    fitter = CostFitter()
    for work in works(random.Random(1), 200, prefill=False):
        fitter.observe(*work, TRUE.step_ms(*work))
    assert fitter.cost() is None
    for rows in (16, 128, 512, 64):
        assert fitter.cost() is None
        fitter.observe(rows, attention_work(0, rows), 0, 0, TRUE.step_ms(rows, attention_work(0, rows), 0, 0))
    assert worst(fitter.cost()) < 0.05
    assert fitter.half() is None, "the whole is known"


def test_steps_of_one_kind_tell_a_half_in_which_a_few_of_the_other_say_nothing() -> None:
    fitter = CostFitter()
    for work in works(random.Random(1), 200, prefill=False):
        fitter.observe(*work, TRUE.step_ms(*work))
    fitter.observe(1, 1, 0, 0, 5000.0)
    for work in works(random.Random(2), 31, prefill=False):
        fitter.observe(*work, TRUE.step_ms(*work))
    half = fitter.half()
    assert fitter.cost() is None
    assert half is not None
    assert half.coefficients[1:3] == (0.0, 0.0)
    assert half.decode_ms(8, 4000) == pytest.approx(TRUE.decode_ms(8, 4000), rel=0.05)


def test_exact_times_give_the_exact_model() -> None:
    fitter = fit()
    assert worst(fitter.cost()) < 1e-3
    cost = fitter.cost()
    assert cost is not None
    assert cost.coefficients == pytest.approx(TRUE.coefficients, rel=0.01)
    assert fitter.error < 1e-3


def test_noise_averages_out_and_is_told_as_error() -> None:
    fitter = fit(num=2000, noise=0.1)
    assert worst(fitter.cost()) < 0.06
    assert 0.04 < fitter.error < 0.13


def test_a_machine_that_stalls_now_and_then_does_not_spoil_the_model() -> None:
    rng = random.Random(3)
    fitter = CostFitter()
    num_stalls = 0
    for i, work in enumerate(works(rng, 1500)):
        stalled = i % 20 == 5
        num_stalls += stalled
        fitter.observe(*work, TRUE.step_ms(*work) * (10 if stalled else 1) * (1 + rng.gauss(0, 0.03)))
    assert num_stalls == 75
    assert worst(fitter.cost()) < 0.1


def test_a_stall_in_the_first_steps_does_not_either() -> None:
    fitter = CostFitter()
    for i, work in enumerate(works(random.Random(3), 64)):
        fitter.observe(*work, TRUE.step_ms(*work) * (30 if i in (0, 3) else 1))
    assert worst(fitter.cost()) < 0.1


def test_a_machine_that_became_slower_for_good_is_followed() -> None:
    slower = StepCost(tuple(3 * c for c in TRUE.coefficients))
    rng = random.Random(5)
    fitter = CostFitter()
    for work in works(rng, 1000):
        fitter.observe(*work, TRUE.step_ms(*work) * (1 + rng.gauss(0, 0.03)))
    assert worst(fitter.cost()) < 0.05
    for work in works(rng, 3000):
        fitter.observe(*work, slower.step_ms(*work) * (1 + rng.gauss(0, 0.03)))
    assert worst(fitter.cost(), slower) < 0.1


def test_hours_of_decoding_do_not_fade_what_is_known_of_prefill() -> None:
    fitter = fit()
    before = fitter.cost()
    for work in works(random.Random(8), 20_000, prefill=False):
        fitter.observe(*work, TRUE.step_ms(*work))
    after = fitter.cost()
    assert before is not None
    assert after is not None
    assert after is not before
    assert after.prefill_ms(1500, 500) == pytest.approx(TRUE.prefill_ms(1500, 500), rel=0.01)


def test_work_that_was_never_varied_is_not_extrapolated() -> None:
    """One stream at one length: whether its 10 ms are per step or per sequence cannot be known."""
    fitter = CostFitter()
    for _ in range(30):
        fitter.observe(100, attention_work(0, 100), 0, 0, 20.0)
        fitter.observe(0, 0, 1, 100, 10.0)
    cost = fitter.cost()
    assert cost is not None
    assert cost.decode_ms(1, 100) == pytest.approx(10.0, rel=0.01)
    assert cost.decode_ms(8, 800) < 12.0


def test_impossible_observations_are_ignored() -> None:
    fitter = fit()
    before = fitter.cost(), fitter.error
    for elapsed_ms in (0.0, -1.0, float("nan"), float("inf")):
        for _ in range(100):
            fitter.observe(10, 55, 1, 10, elapsed_ms)
    for _ in range(100):
        fitter.observe(0, 0, 0, 0, 5.0)
    assert (fitter.cost(), fitter.error) == before


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), times=st.sampled_from(["noise", "falling", "constant"]))
def test_coefficients_are_never_negative_whatever_was_measured(seed: int, times: str) -> None:
    rng = random.Random(seed)
    fitter = CostFitter()
    for rows, context, num, decode_context in works(rng, 150):
        ms = {"noise": rng.uniform(0.1, 50), "falling": 100 / (1 + rows + num), "constant": 7.0}[times]
        fitter.observe(rows, context, num, decode_context, ms)
    cost = fitter.cost()
    assert cost is not None
    assert min(cost.coefficients) >= 0.0
    assert StepCost.known(cost.coefficients) == cost


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 5))
def test_the_solver_finds_the_optimum(seed: int, n: int) -> None:
    """Karush, Kuhn and Tucker: the gradient is zero where x > 0 and not upwards where x = 0."""
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 1) for _ in range(n)] for _ in range(n + 2)]
    matrix = [[sum(r[i] * r[j] for r in rows) + (i == j) * 1e-3 for j in range(n)] for i in range(n)]
    target = [rng.gauss(0, 1) for _ in range(n)]
    x = solve_nonnegative(matrix, target)
    for i in range(n):
        gradient = target[i] - sum(matrix[i][j] * x[j] for j in range(n))
        assert x[i] >= 0.0
        assert abs(gradient) < 1e-6 if x[i] > 0 else gradient < 1e-6
