"""The fast sampler draws what the literal one draws, over random logits and parameters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.null.sampling import literal
from xllm.engine.plan import SampleOp
from xllm.engine.sampling import Sampler, drawing
from xllm.engine.sampling import candidates as candidates_module
from xllm.engine.sampling.candidates import candidates
from xllm.errors import RequestError
from xllm.types import SamplingParams


def logits_of(seed: int, width: int, scale: float, grain: float) -> np.ndarray:
    """Normal logits; `grain` > 0 rounds them so that many are equal."""
    x = np.random.default_rng(seed).standard_normal(width) * scale
    return (np.round(x / grain) * grain if grain else x).astype(np.float32)


ROWS = st.builds(
    logits_of,
    seed=st.integers(0, 2**32),
    width=st.sampled_from([1, 2, 3, 63, 64, 65, 200, 513]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    grain=st.sampled_from([0.0, 0.5, 4.0]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, SampleOp]:
    row = draw(ROWS)
    token = st.integers(0, row.size - 1)
    tokens = st.lists(token, max_size=8).map(tuple)
    rarely = lambda s, default: st.one_of(st.just(default), st.just(default), s)  # noqa: E731
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-6, 1e-4, 0.2, 0.7, 1.0, 1.3, 2.0])),
        top_k=draw(rarely(st.integers(-1, row.size + 3), 0)),
        top_p=draw(rarely(st.floats(1e-6, 1.0), 1.0)),
        min_p=draw(rarely(st.floats(0.0, 1.0), 0.0)),
        repetition_penalty=draw(rarely(st.floats(0.01, 10.0), 1.0)),
        presence_penalty=draw(rarely(st.floats(-2.0, 2.0), 0.0)),
        frequency_penalty=draw(rarely(st.floats(-2.0, 2.0), 0.0)),
        logit_bias=draw(rarely(st.dictionaries(token, st.floats(-100.0, 100.0), max_size=5), None)),
        allowed_token_ids=draw(rarely(st.lists(token, min_size=1, max_size=20).map(tuple), None)),
        bad_words_token_ids=draw(
            rarely(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple), ())
        ),
    )
    return row, SampleOp(
        params=params,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        choices=draw(st.sampled_from([(0,), (0, 1, 2), (7,)])),
        offset=draw(st.integers(0, 5000)),
        banned=draw(rarely(tokens, ())),
        prompt=draw(tokens),
        output=draw(tokens),
    )


def drawn(row: np.ndarray, op: SampleOp) -> list[int]:
    return [c.tokens[0].token_id for c in Sampler().sample(row, op)]


@given(case=cases())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_draws_equal_the_literal_sampler(case: tuple[np.ndarray, SampleOp]) -> None:
    row, op = case
    before = row.copy()
    if max(literal.shaped(row, op)) == -np.inf:
        with pytest.raises(RequestError) as caught:
            drawn(row, op)
        assert caught.value.code == "no_token_allowed"
    else:
        assert drawn(row, op) == literal.sample(row, op)
    assert np.array_equal(row, before)


@pytest.mark.parametrize("few", [0, 128, 10**9])
@pytest.mark.parametrize("slack", [1e-4, 10.0])
@pytest.mark.parametrize("small", [0, 1024])
def test_no_shortcut_changes_a_draw(
    monkeypatch: pytest.MonkeyPatch, few: int, slack: float, small: int
) -> None:
    """Each shortcut is switched off or forced in turn; tokens stay those of the literal sampler."""
    monkeypatch.setattr(drawing, "_FEW", few)
    monkeypatch.setattr(candidates_module, "_SLACK", slack)
    monkeypatch.setattr(candidates_module, "_SMALL", small)
    for seed in range(12):
        row = logits_of(seed, 400, (0.1, 1.0, 4.0)[seed % 3], (0.0, 0.5)[seed % 2])
        params = SamplingParams(temperature=0.8, top_p=(1.0, 0.5, 0.97, 0.999)[seed % 4])
        op = SampleOp(params=params, seed=seed, choices=(0, 1), offset=seed)
        assert drawn(row, op) == literal.sample(row, op)


@given(row=ROWS, top_k=st.integers(0, 600), top_p=st.floats(1e-6, 1.0), min_p=st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_filters_keep_exactly_the_literal_set(
    row: np.ndarray, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    op = SampleOp(params=params, seed=0, choices=(0,), offset=0)
    kept = candidates(row, params).ids
    found = range(row.size) if kept is None else kept.tolist()
    assert sorted(found) == sorted(literal.survivors([float(v) for v in row], op))


def test_a_crowd_of_unlikely_tokens_still_gets_its_share() -> None:
    """2,000 tokens eight below the best hold 40 % of the mass: discarding them early would show."""
    row = np.zeros(2000, dtype=np.float32)
    row[1234] = 8.0
    ops = [SampleOp(params=SamplingParams(), seed=3, choices=(0,), offset=o) for o in range(12)]
    found = [drawn(row, op) for op in ops]
    assert found == [literal.sample(row, op) for op in ops]
    assert 2 <= found.count([1234]) <= 10


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_token_whose_predecessors_reach_top_p_exactly_is_out(top_p: float, kept: int) -> None:
    found = candidates(np.zeros(4, dtype=np.float32), SamplingParams(top_p=top_p)).ids
    assert found is not None
    assert found.tolist() == list(range(kept))
