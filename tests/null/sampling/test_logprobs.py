"""Log-probabilities: raw distribution, ranks, order of ties, independence of neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from xllm.engine.plan import SampleOp
from xllm.engine.sampling import Sampler
from xllm.errors import InternalError
from xllm.types import SamplingParams, TokenLogprobs


def logits(rows: int, width: int = 777) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal((rows, width)) * 5).astype(np.float32)


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def sampled(row: np.ndarray, **params: object) -> TokenLogprobs:
    case = SampleOp(params=SamplingParams(**params), seed=4, choices=(0,), offset=0)  # type: ignore[arg-type]
    found = Sampler().sample(row, case)[0].tokens[0]
    assert found.logprobs is not None
    assert found.logprobs.token.token_id == found.token_id
    return found.logprobs


def test_values_are_the_log_softmax_and_ranks_count_greater_logits() -> None:
    row = logits(1)[0]
    expected = log_softmax(row)
    (found,) = Sampler().prompt_logprobs(row[None], (55,), 5)
    assert found.token.logprob == pytest.approx(expected[55], abs=1e-7)
    assert found.token.rank == 1 + int((row > row[55]).sum())
    best = np.argsort(-row)[:5]
    assert [e.token_id for e in found.top] == best.tolist()
    assert [e.rank for e in found.top] == [1, 2, 3, 4, 5]
    assert [e.logprob for e in found.top] == pytest.approx(expected[best].tolist(), abs=1e-7)


def test_they_are_raw_whatever_the_parameters_do_to_the_logits() -> None:
    row = logits(1)[0]
    best = int(row.argmax())
    found = sampled(row, temperature=0.3, logit_bias={7: 100.0}, top_k=3, logprobs=2)
    assert found.token.token_id == 7
    assert found.token.logprob == pytest.approx(log_softmax(row)[7], abs=1e-7)
    assert found.top[0].token_id == best


def test_zero_asks_for_the_token_alone_and_none_for_nothing() -> None:
    row = logits(1)[0]
    assert sampled(row, logprobs=0).top == ()
    case = SampleOp(params=SamplingParams(), seed=4, choices=(0,), offset=0)
    assert Sampler().sample(row, case)[0].tokens[0].logprobs is None


def test_equal_logits_are_listed_by_id_and_share_a_rank() -> None:
    row = np.zeros(50, dtype=np.float32)
    row[[30, 10]] = 1.0
    found = sampled(row, temperature=0.0, logprobs=4)
    assert [(e.token_id, e.rank) for e in found.top] == [(10, 1), (30, 1), (0, 3), (1, 3)]


def test_a_row_gives_the_same_bits_alone_and_among_others() -> None:
    rows = logits(9)
    targets = tuple(range(100, 109))
    together = Sampler().prompt_logprobs(rows, targets, 3)
    alone = [Sampler().prompt_logprobs(rows[i : i + 1].copy(), (targets[i],), 3)[0] for i in range(9)]
    strided = [
        Sampler().prompt_logprobs(np.repeat(rows, 2, axis=1)[i : i + 1, ::2], (targets[i],), 3)[0]
        for i in range(9)
    ]
    assert list(together) == alone == strided


def test_rows_without_a_successor_are_left_out() -> None:
    assert len(Sampler().prompt_logprobs(logits(4), (1, 2, 3), 0)) == 3
    assert Sampler().prompt_logprobs(logits(1), (), 0) == ()
    with pytest.raises(InternalError):
        Sampler().prompt_logprobs(logits(1), (1, 2), 0)


def test_more_top_tokens_than_the_vocabulary_gives_all_of_them() -> None:
    assert len(sampled(np.zeros(7, dtype=np.float32), logprobs=20).top) == 7
