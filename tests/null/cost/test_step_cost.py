"""The step-time model: what it predicts, and that cutting a prompt does not change its attention."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cost import StepCost, attention_work
from xllm.errors import InternalError

COST = StepCost((2.0, 0.1, 0.0005, 0.3, 0.0002))


def test_attention_work_is_the_sum_over_rows() -> None:
    assert attention_work(10, 3) == 11 + 12 + 13
    assert attention_work(0, 1) == 1
    assert attention_work(7, 0) == 0


@given(
    cached=st.integers(0, 5000),
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=8),
)
def test_a_prompt_costs_the_same_attention_however_it_is_cut(cached: int, cuts: list[int]) -> None:
    start, total = cached, 0.0
    for rows in cuts:
        total += COST.step_ms(rows, attention_work(start, rows), 0, 0) - COST.coefficients[0]
        start += rows
    assert total == pytest.approx(COST.prefill_ms(start, cached) - COST.coefficients[0])


def test_prefill_is_quadratic_and_knows_its_cached_prefix() -> None:
    single, double = COST.prefill_ms(1000), COST.prefill_ms(2000)
    assert double > 2 * single - COST.coefficients[0]
    # 1900 of 2000 cached: a hundred rows, each of which still attends to nineteen hundred tokens.
    rows = 100
    expected = 2.0 + 0.1 * rows + 0.0005 * (rows * 1900 + rows * (rows + 1) / 2)
    assert COST.prefill_ms(2000, 1900) == pytest.approx(expected)
    assert COST.prefill_ms(2000, 1900) > COST.prefill_ms(100)


def test_the_row_that_the_first_token_is_drawn_from_is_always_computed() -> None:
    assert COST.prefill_ms(128, 128) == COST.prefill_ms(128, 127) > COST.coefficients[0]


def test_the_constant_part_is_paid_per_chunk() -> None:
    assert COST.prefill_ms(1025, 0, max_rows=512) - COST.prefill_ms(1025) == pytest.approx(2 * 2.0)


def test_a_decode_step_is_linear_in_sequences_and_in_their_tokens() -> None:
    assert COST.decode_ms(4, 4000) == pytest.approx(2.0 + 4 * 0.3 + 4000 * 0.0002)
    assert COST.decode_ms(4, 4000) == COST.step_ms(0, 0, 4, 4000)


@pytest.mark.parametrize(
    "bad",
    [
        (),
        (1.0,),
        (1.0, 1.0, 1.0, 1.0, -0.1),
        (1.0, 1.0, 1.0, 1.0, float("nan")),
        (1.0,) * 4 + (float("inf"),),
    ],
)
def test_a_peer_that_sends_nonsense_is_a_peer_without_a_cost(bad: tuple[float, ...]) -> None:
    assert StepCost.known(bad) is None
    with pytest.raises(InternalError, match="coefficients"):
        StepCost.from_coefficients(bad)


def test_coefficients_cross_the_wire_unchanged() -> None:
    assert StepCost.from_coefficients(COST.coefficients) == COST
