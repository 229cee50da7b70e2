"""What a client may rely on: constraints hold, equal coordinates give equal tokens, frequencies fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.engine.plan import SampleOp
from xllm.engine.sampling import Sampler, SampleRow, needs_history
from xllm.engine.sampling.constraints import Constraints
from xllm.errors import InternalError, RequestError, XllmError
from xllm.types import SamplingParams

WIDTH = 96


def row(seed: int = 0, width: int = WIDTH, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(width) * scale).astype(np.float32)


def op(
    *, seed: int = 1, choices: tuple[int, ...] = (0,), offset: int = 0, banned: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any,
) -> SampleOp:  # fmt: skip
    return SampleOp(
        params=SamplingParams(**params), seed=seed, choices=choices, offset=offset, banned=banned,
        prompt=prompt, output=output,
    )  # fmt: skip


def token(logits: np.ndarray, case: SampleOp) -> int:
    return Sampler().sample(logits, case)[0].tokens[0].token_id


@given(
    allowed=st.sets(st.integers(0, WIDTH - 1), min_size=1),
    seed=st.integers(0, 99),
    t=st.sampled_from([0.0, 1.0, 2.0]),
)
@settings(deadline=None, derandomize=True)
def test_only_allowed_tokens_are_drawn(allowed: set[int], seed: int, t: float) -> None:
    assert token(row(seed), op(seed=seed, temperature=t, allowed_token_ids=tuple(allowed))) in allowed


@given(banned=st.sets(st.integers(0, WIDTH - 1), max_size=WIDTH - 1), seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True)
def test_banned_tokens_are_never_drawn_even_with_the_largest_bias(banned: set[int], seed: int) -> None:
    bias = dict.fromkeys(banned, 100.0)
    assert token(row(seed), op(seed=seed, banned=tuple(banned), logit_bias=bias)) not in banned


def test_a_ban_beyond_the_head_bans_nothing() -> None:
    assert token(row(), op(temperature=0.0, banned=(WIDTH, 10**9))) == int(row().argmax())


def test_bias_moves_the_greedy_token() -> None:
    assert token(row(), op(temperature=0.0, logit_bias={17: 100.0})) == 17
    best = int(row().argmax())
    assert token(row(), op(temperature=0.0, logit_bias={best: -100.0})) != best


def test_all_tokens_biased_down_is_still_a_distribution() -> None:
    assert token(row(), op(logit_bias=dict.fromkeys(range(WIDTH), -100.0))) == token(row(), op())


def test_bad_word_is_blocked_only_where_it_would_be_completed() -> None:
    best = int(row().argmax())
    other = (best + 1) % WIDTH
    words = {"bad_words_token_ids": ((3, other, best),), "temperature": 0.0}
    assert token(row(), op(output=(3, other), **words)) != best
    for output in ((), (other,), (3, other, 3), (other, 3)):
        assert token(row(), op(output=output, **words)) == best
    assert token(row(), op(output=(3,), prompt=(3, other), **words)) == best, "the prompt does not count"
    assert token(row(), op(bad_words_token_ids=((best,),), temperature=0.0)) != best


@pytest.mark.parametrize("grain", [0.0, 1.0])
def test_top_k_one_equals_greedy_also_among_equal_logits(grain: float) -> None:
    for seed in range(40):
        logits = row(seed)
        logits = np.round(logits / grain) * np.float32(grain) if grain else logits
        assert token(logits, op(seed=seed, top_k=1)) == token(logits, op(temperature=0.0))


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(WIDTH, dtype=np.float32)
    logits[[40, 12, 77]] = 3.0
    assert token(logits, op(temperature=0.0)) == 12
    assert token(logits, op(temperature=1e-6)) == 12
    assert token(logits, op(temperature=1e-40)) == 12


def test_a_token_depends_on_its_coordinates_only() -> None:
    sampler = Sampler()
    grid = [(s, c, o) for s in (-7, 0, 2**63 - 1) for c in (0, 1, 5) for o in (0, 1, 900)]
    forward = {g: sampler.sample(row(), op(seed=g[0], choices=(g[1],), offset=g[2]))[0] for g in grid}
    backward = {
        g: Sampler().sample(row(), op(seed=g[0], choices=(g[1],), offset=g[2]))[0] for g in grid[::-1]
    }
    assert forward == backward
    assert len({c.tokens[0].token_id for c in forward.values()}) > 10, "coordinates must matter"


def test_choices_drawn_together_equal_choices_drawn_alone() -> None:
    together = Sampler().sample(row(), op(choices=(0, 1, 2, 3)))
    assert together == tuple(Sampler().sample(row(), op(choices=(c,)))[0] for c in range(4))
    assert [c.choice for c in together] == [0, 1, 2, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_fit_the_softmax(temperature: float) -> None:
    """χ² over 8,000 draws of fixed seeds; the bound is the 99.9 % quantile for 11 degrees of freedom."""
    logits = row(5, width=12, scale=1.0)
    expected = np.exp(logits.astype(np.float64) / temperature)
    expected /= expected.sum()
    sampler, params = Sampler(), SamplingParams(temperature=temperature)
    draws = [
        sampler.sample(logits, SampleOp(params=params, seed=s, choices=(c,), offset=o))[0].tokens[0].token_id
        for s in range(20)
        for c in range(4)
        for o in range(100)
    ]
    counts = np.bincount(draws, minlength=12)
    assert float(((counts - 8000 * expected) ** 2 / (8000 * expected)).sum()) < 31.3


def test_penalties_follow_the_formulas() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1, 0.5], dtype=np.float32)
    greedy = {"temperature": 0.0}
    assert token(logits, op(repetition_penalty=2.0, prompt=(0,), **greedy)) == 1
    assert token(logits, op(repetition_penalty=2.0, output=(0, 1), **greedy)) == 0
    assert token(-logits, op(repetition_penalty=1.2, output=(3,), **greedy)) == 2
    assert token(logits, op(presence_penalty=0.2, output=(0,), **greedy)) == 1
    assert token(logits, op(presence_penalty=0.2, prompt=(0,), **greedy)) == 0
    assert token(logits, op(frequency_penalty=0.06, output=(0,), **greedy)) == 0
    assert token(logits, op(frequency_penalty=0.06, output=(0, 0), **greedy)) == 1


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 5, "bad_words_token_ids": ((1,), (2,))}, False),
        ({"bad_words_token_ids": ((1,), (2, 3))}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
    ],
)
def test_history_is_asked_for_only_where_it_is_read(params: dict[str, Any], needed: bool) -> None:
    assert needs_history(SamplingParams(**params)) is needed


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_nothing_left_by_the_masks_ends_the_request(t: float) -> None:
    with pytest.raises(RequestError) as caught:
        token(row(), op(temperature=t, allowed_token_ids=(3, 4), banned=(4, 3)))
    assert caught.value.code == "no_token_allowed"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_broken_logits_are_an_internal_error_even_where_masked(bad: float, t: float) -> None:
    logits = row()
    logits[9] = bad
    with pytest.raises(InternalError):
        token(logits, op(temperature=t, banned=(9,)))
    with pytest.raises(InternalError):
        token(np.full(WIDTH, -np.inf, dtype=np.float32), op(temperature=t))


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {WIDTH: 1.0}}, {"allowed_token_ids": (-1,)}, {"bad_words_token_ids": ((1, WIDTH),)}],
)
def test_ids_outside_the_logits_end_only_their_request(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        token(row(), op(**params))
    assert caught.value.code == "value_out_of_range"


def test_an_error_or_a_bug_ends_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.stack([row(i) for i in range(4)])
    logits[1, 3] = math.nan
    bug = op(prompt=(3,), repetition_penalty=2.0)
    ops = [op(), op(), op(allowed_token_ids=(1,), banned=(1,)), bug, op(seed=5)]
    rows = [SampleRow(min(i, 3), case) for i, case in enumerate(ops)]

    def penalise(self: Constraints, x: np.ndarray, case: SampleOp) -> None:
        if case is bug:
            raise RuntimeError("/secret/path")

    monkeypatch.setattr(Constraints, "penalise", penalise)
    found = Sampler().sample_rows(logits, rows)
    assert [f.code if isinstance(f, XllmError) else None for f in found] == [
        None, "internal_error", "no_token_allowed", "internal_error", None,
    ]  # fmt: skip
    assert "secret" not in str(found[3])
    assert found[4] == Sampler().sample(logits[3], ops[4])


def test_one_sampler_keeps_requests_apart() -> None:
    sampler = Sampler()
    cases = [op(temperature=0.0, allowed_token_ids=(i,)) for i in range(WIDTH)]
    for _ in range(2):
        found = [sampler.sample(row(), case)[0].tokens[0].token_id for case in cases]
        assert found == list(range(WIDTH))


def test_the_prompt_cache_follows_the_prompt() -> None:
    sampler, params = Sampler(), SamplingParams(temperature=0.0, repetition_penalty=10.0)
    logits = np.array([2.0, 1.9, 1.8], dtype=np.float32)
    for prompt, expected in (((0,), 1), ((0, 1), 2), ((1,), 0), ((), 0)):
        case = SampleOp(params=params, seed=0, choices=(0,), offset=0, prompt=prompt)
        assert sampler.sample(logits, case)[0].tokens[0].token_id == expected


def test_the_constraint_cache_follows_the_width() -> None:
    sampler, case = Sampler(), op(temperature=0.0, allowed_token_ids=(90,))
    assert sampler.sample(row(), case)[0].tokens[0].token_id == 90
    with pytest.raises(RequestError):
        sampler.sample(row(width=80), case)
