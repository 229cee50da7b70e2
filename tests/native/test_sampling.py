"""The native sampler draws the very tokens of the numpy one, on every path, whatever the row's company."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.native.native_driver import drawer
from tests.null.sampling.test_against_literal import ROWS, cases
from tests.null.sampling.test_vectors import DRAWS, adr_row
from xllm.engine.kernels.native.isa import ISAS
from xllm.engine.kernels.native.sampling import NativeDrawer
from xllm.engine.plan import SampleOp
from xllm.engine.sampling import Sampler, SampleRow
from xllm.engine.sampling.sampler import Sampled
from xllm.errors import InternalError, RequestError, XllmError
from xllm.types import SamplingParams

pytestmark = pytest.mark.skipif(drawer() is None, reason="the native kernels are not built here")

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=[isa.name for isa in ISAS])
def native(request: pytest.FixtureRequest) -> NativeDrawer:
    found = drawer(request.param)
    if found is None:
        pytest.skip(f"the {request.param} kernels are not built, or this CPU cannot run them")
    return found


def told(outcomes: list[Sampled]) -> list[object]:
    """Comparable: tokens, or the error's kind and code."""
    return [(type(o).__name__, o.code) if isinstance(o, XllmError) else o for o in outcomes]


def both(native: NativeDrawer, logits: np.ndarray, rows: list[SampleRow]) -> list[object]:
    before = logits.copy()
    found = told(Sampler(drawer=native).sample_rows(logits, rows))
    assert found == told(Sampler().sample_rows(logits, rows))
    assert np.array_equal(logits.view(np.uint32), before.view(np.uint32))
    return found


def op(seed: int = 1, choices: tuple[int, ...] = (0,), offset: int = 0, **params: object) -> SampleOp:
    return SampleOp(params=SamplingParams(**params), seed=seed, choices=choices, offset=offset)  # type: ignore[arg-type]


@given(case=cases())
@PROPERTY
def test_random_rows_and_parameters(native, case: tuple[np.ndarray, SampleOp]) -> None:
    both(native, case[0][None], [SampleRow(0, case[1])])


@given(
    row=ROWS,
    temperature=st.floats(1e-5, 5.0),
    top_k=st.integers(0, 600),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0), st.floats(0.999999, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.floats(0.0, 1e-12)),
    lowest=st.integers(0, 9),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@PROPERTY
def test_random_filters(native, row, temperature, top_k, top_p, min_p, lowest, seed) -> None:
    row = row.copy()
    if row.size > 1:
        row[lowest::10] = -np.inf
        row[row.size // 2] = 1.0
    case = op(seed, (0, 1, 5), seed & 1023, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    both(native, row[None], [SampleRow(0, case)])


@pytest.mark.parametrize("width", [4093, 49152, 50257])
def test_whole_vocabularies(native, width: int) -> None:
    """Peaked, flat, coarse and constant rows under every kind of filter, all in one call."""
    rng = np.random.default_rng(width)
    normal = rng.standard_normal((6, width)).astype(np.float32)
    scales = np.array([4.0, 1.0, 0.01, 3.0, 0.0, 30.0], dtype=np.float32)
    logits = normal * scales[:, None] + np.array([0, 0, 0, 0, 7, -1e5], dtype=np.float32)[:, None]
    logits[3] = np.round(logits[3])
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0}, {}, {"temperature": 0.8}, {"temperature": 0.05}, {"temperature": 1e-5},
        {"top_p": 0.95, "top_k": 50}, {"top_p": 0.9, "temperature": 0.7}, {"top_p": 0.5},
        {"top_p": 0.9999}, {"top_k": 1}, {"top_k": 1000}, {"top_k": width - 1, "temperature": 2.0},
        {"min_p": 0.05}, {"min_p": 1e-9, "top_p": 0.99}, {"top_k": 3000, "top_p": 0.8, "min_p": 1e-4},
    ]  # fmt: skip
    rows = [
        SampleRow(r, op(r * 1000 + k, (0, 3), k, **kind)) for r in range(6) for k, kind in enumerate(kinds)
    ]
    both(native, logits, rows)


def test_the_number_of_threads_changes_no_token() -> None:
    logits = np.random.default_rng(0).standard_normal((9, 5000)).astype(np.float32)
    rows = [
        SampleRow(i % 9, op(i, (0, 1), i, top_p=(1.0, 0.9)[i % 2], top_k=(0, 40)[i % 3 == 0]))
        for i in range(30)
    ]
    alone = told(Sampler().sample_rows(logits, rows))
    for num_threads in (1, 2, 3):
        for _ in range(5):
            assert told(Sampler(drawer=drawer(None, num_threads)).sample_rows(logits, rows)) == alone


@pytest.mark.parametrize(("params", "offset", "tokens"), DRAWS)
def test_the_vectors_of_the_adr(native, params, offset: int, tokens: tuple[int, ...]) -> None:
    case = op(2026, (0, 1, 2), offset, **params)
    (found,) = Sampler(drawer=native).sample_rows(adr_row()[None], [SampleRow(0, case)])
    assert not isinstance(found, XllmError)
    assert tuple(c.tokens[0].token_id for c in found) == tokens


def test_an_error_ends_its_row_only(native) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 333)).astype(np.float32)
    logits[1, 332] = math.nan
    logits[2, 5] = math.inf
    logits[3] = -math.inf
    logits[4, 0] = 3e38
    params = {"temperature": 0.001}
    none = np.zeros(11, dtype=np.uint32)
    rows = [SampleRow(i, op(**params)) for i in range(6)]
    rows += [SampleRow(i, op(temperature=0.0)) for i in range(6)]
    rows += [SampleRow(0, op(), none), SampleRow(1, op(), none), SampleRow(5, op(logit_bias={333: 1.0}))]
    found = Sampler(drawer=native).sample_rows(logits, rows)
    failed = [i for i, outcome in enumerate(found) if isinstance(outcome, XllmError)]
    assert failed == [1, 2, 3, 4, 7, 8, 9, 12, 13, 14]
    assert isinstance(found[12], RequestError)
    assert found[12].code == "no_token_allowed"
    assert isinstance(found[13], InternalError), "a broken row is broken also where it is masked"
    both(native, logits, rows)


@given(data=st.data(), width=st.sampled_from([1, 31, 32, 33, 500]))
@PROPERTY
def test_only_tokens_of_a_late_mask_are_drawn(native, data: st.DataObject, width: int) -> None:
    logits = np.random.default_rng(width).standard_normal((1, width)).astype(np.float32)
    allowed = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=20))
    mask = np.zeros((width + 31) // 32, dtype=np.uint32)
    for i in allowed:
        mask[i // 32] |= np.uint32(1 << i % 32)
    for params in ({"temperature": 0.0}, {}, {"top_k": 3, "presence_penalty": 1.0}):
        late = [SampleRow(0, op(7, (0, 1), 3, **params), mask)]
        early = [SampleRow(0, op(7, (0, 1), 3, allowed_token_ids=tuple(sorted(allowed)), **params))]
        assert both(native, logits, late) == both(native, logits, early)


def test_rows_may_be_part_of_wider_memory(native) -> None:
    wide = np.random.default_rng(1).standard_normal((8, 700)).astype(np.float32)
    rows = [SampleRow(i, op(i)) for i in (6, 0, 3, 3)]
    assert both(native, wide[:, 50:651], rows) == both(native, wide[:, 50:651].copy(), rows)
    assert both(native, wide.astype(np.float64), rows) == both(native, wide, rows)


def test_every_winner_of_a_flat_row_can_be_any_token(native) -> None:
    """Flat rows leave the noise alone to decide: a wrong word anywhere in the vocabulary would show."""
    logits = np.zeros((1, 259), dtype=np.float32)
    rows = [SampleRow(0, op(seed, (0,), seed)) for seed in range(400)]
    found = both(native, logits, rows)
    assert len({str(tokens) for tokens in found}) > 150
