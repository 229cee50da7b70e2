"""The runner's own duties: errors stay with their sequence, slices of logits add up, weights are checked."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.reference.runner_driver import GREEDY, DictTensors, Driver, make_runner
from xllm.arch import ArchConfig
from xllm.artifacts.source import DummySource
from xllm.engine.plan import SampleOp, SequencePlan, StepPlan
from xllm.engine.runner.batch import MAX_LOGIT_ROWS
from xllm.engine.sampling import Sampled, SampleRow
from xllm.errors import ConfigError
from xllm.types import SamplingParams

pytest.importorskip("torch", reason="the reference platform needs the extra xllm[torch]")

ARCH = ArchConfig(
    name="llama",
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=259,  # not a multiple of 16, so that the head is padded and cut
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position=1024,
    tie_word_embeddings=False,
    layer_windows=(None, None),
)


@pytest.fixture(scope="module")
def runner():
    return make_runner(ARCH, DummySource(ARCH))


def plan_of(seq_id: int, page: int, tokens: tuple[int, ...], **changes: object) -> SequencePlan:
    base = SequencePlan(
        seq_id=seq_id,
        start=0,
        tokens=tokens,
        pages=(tuple(range(page, page + 4)),),
        first_logit_row=len(tokens) - 1,
        sample=SampleOp(params=GREEDY, seed=0, choices=(0,), offset=0),
    )
    return msgspec.structs.replace(base, **changes)


def test_a_failure_to_sample_ends_that_sequence_only(runner) -> None:
    everything = SamplingParams(temperature=0.0, allowed_token_ids=(7,))
    banned = SampleOp(params=everything, seed=0, choices=(0,), offset=0, banned=(7,))
    plan = StepPlan(
        step=3, sequences=(plan_of(1, 0, (5, 6)), plan_of(2, 8, (5, 6), sample=banned), plan_of(3, 16, (9,)))
    )
    result = runner.execute(plan)
    assert result.step == 3
    errors = {s.seq_id: s.error and s.error.code for s in result.sequences}
    assert errors == {1: None, 2: "no_token_allowed", 3: None}
    assert [len(s.choices) for s in result.sequences] == [1, 0, 1]


def test_a_bug_in_sampling_is_an_internal_error_without_details(runner, monkeypatch) -> None:
    class Broken:
        def sample_rows(self, logits: np.ndarray, rows: list[SampleRow]) -> list[Sampled]:
            raise RuntimeError("/secret/path")

    monkeypatch.setattr(runner, "_sampler", Broken())
    (result,) = runner.execute(StepPlan(step=0, sequences=(plan_of(1, 0, (5, 6)),))).sequences
    assert result.error is not None
    assert result.error.kind == "InternalError"
    assert "secret" not in result.error.message


def test_prompt_logprobs_over_several_slices_equal_log_softmax(runner) -> None:
    tokens = tuple(int(t) for t in np.random.default_rng(0).integers(0, 259, MAX_LOGIT_ROWS + 60))
    rows = {}
    runner.logits_tap = lambda seq_id, position, logits: rows.__setitem__((seq_id, position), logits)
    scored = plan_of(
        2, 8, tokens, first_logit_row=0, prompt_logprobs=1, prompt_targets=tokens[1:], sample=None
    )
    # The first sequence shifts the slices, so that one ends within the second sequence.
    result = runner.execute(StepPlan(step=0, sequences=(plan_of(1, 0, (5, 6)), scored)))
    runner.logits_tap = None
    found = result.sequences[1].prompt_logprobs
    assert len(found) == len(tokens) - 1
    for i, entry in enumerate(found):
        logits = rows[2, i].astype(np.float64)
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert entry.token.token_id == tokens[i + 1]
        assert entry.token.logprob == pytest.approx(expected[tokens[i + 1]], abs=1e-5)
        assert entry.top[0].token_id == int(logits.argmax())


def test_logits_are_as_wide_as_the_vocabulary(runner) -> None:
    driver = Driver(runner)
    assert driver.prefill(driver.new([1, 2, 3])).rows().shape == (3, 259)


def test_a_page_that_was_given_back_is_refused(runner) -> None:
    plan = plan_of(1, 0, (5,), start=70, pages=((-1, 3),))
    with pytest.raises(Exception, match="page that its sequence does not hold"):
        runner.execute(StepPlan(step=0, sequences=(plan,)))


def test_a_step_without_logits_yields_no_tokens(runner) -> None:
    plan = plan_of(1, 0, (5, 6, 7), first_logit_row=3, sample=None)
    (result,) = runner.execute(StepPlan(step=0, sequences=(plan,))).sequences
    assert result.choices == ()
    assert result.error is None


def tensors() -> dict[str, np.ndarray]:
    source = DummySource(ARCH)
    return {name: source.load_f32(name) for name in source.names()}


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    missing = tensors()
    del missing["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        make_runner(ARCH, DictTensors(missing))
    extra = {**tensors(), "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(ConfigError, match=r"q_proj\.bias"):
        make_runner(ARCH, DictTensors(extra))
    misshapen = {**tensors(), "model.norm.weight": np.zeros(65, np.float32)}
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \(65,\)"):
        make_runner(ARCH, DictTensors(misshapen))
