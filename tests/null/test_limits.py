"""Boundary table of request validation: at the limit accepted, one beyond refused, ×1000 refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from xllm.errors import RequestError
from xllm.limits import LIMITS, PARAM_RANGES, resolve_max_tokens, typed_params, validate_spec
from xllm.types import SLO, MediaSegment, ModelCard, RequestSpec, SamplingParams, TokenSegment

MAX_LEN, VOCAB, HEAD = 1000, 500, 512
CARD = ModelCard(
    model_id="m", aliases=(), architecture="llama", weights_digest="", dtype="float32",
    vocab_size=VOCAB, head_width=HEAD, max_model_len=MAX_LEN, eos_token_ids=(2,), assets={},
    kv_layout_digest="", numerics_class="", deterministic=True, page_size=64, num_pages=8,
)  # fmt: skip


def spec(
    prompt: tuple[int, ...] = (1, 2, 3), *, more: dict[str, Any] | None = None, **params: Any
) -> RequestSpec:
    fields: dict[str, Any] = {
        "request_id": "r",
        "model": "m",
        "segments": (TokenSegment(prompt),),
        "params": SamplingParams(**params),
    }
    return RequestSpec(**(fields | (more or {})))


def refusal(case: RequestSpec) -> RequestError:
    with pytest.raises(RequestError) as caught:
        validate_spec(case, CARD)
    return caught.value


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"n": 1},
    {"n": 16},
    {"temperature": 0.0},
    {"temperature": 1e-40},
    {"temperature": 2.0},
    {"top_p": 1e-300},
    {"top_p": 1.0},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 2**40},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 10.0},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"max_tokens": 1},
    {"max_tokens": MAX_LEN - 3},
    {"max_tokens": None, "min_tokens": MAX_LEN - 3},
    {"min_tokens": 16, "max_tokens": 16},
    {"logprobs": 0, "prompt_logprobs": 0},
    {"logprobs": 20, "prompt_logprobs": 20},
    {"stop": "x" * 256},
    {"stop": ["x" * 256] * 16},
    {"stop_token_ids": (0, VOCAB - 1)},
    {"stop_token_ids": (5,) * 256},
    {"allowed_token_ids": (VOCAB - 1,)},
    {"allowed_token_ids": (1,) * LIMITS.max_allowed_token_ids},
    {"logit_bias": {0: -100.0, VOCAB - 1: 100.0}},
    {"logit_bias": {}},
    {"bad_words": ("x" * 256,) * 256},
    {"bad_words_token_ids": ((1,) * LIMITS.max_bad_word_len,) * LIMITS.max_bad_word_sequences},
    {"extra_args": {"a": {"b": [1, 2.0, None, "x"]}}},
]

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 0}),
    ("n", {"n": -1}),
    ("n", {"n": 17}),
    ("n", {"n": 10**9}),
    ("n", {"n": 2**63}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": -1.0}),
    ("top_p", {"top_p": 1.1}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 2**64}),
    ("min_p", {"min_p": 1.5}),
    ("min_p", {"min_p": -1e-9}),
    ("presence_penalty", {"presence_penalty": 2.01}),
    ("presence_penalty", {"presence_penalty": -2.01}),
    ("frequency_penalty", {"frequency_penalty": 2.01}),
    ("frequency_penalty", {"frequency_penalty": -2.01}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("repetition_penalty", {"repetition_penalty": -1.0}),
    ("repetition_penalty", {"repetition_penalty": 10.01}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": -(2**63) - 1}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 10**4000}),
    ("min_tokens", {"min_tokens": -1}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": 20_000}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ("a", "")}),
    ("stop", {"stop": "x" * 257}),
    ("stop", {"stop": "x" * 1_000_000}),
    ("stop", {"stop": ("a",) * 17}),
    ("stop", {"stop": ("a",) * 16_000}),
    ("stop_token_ids", {"stop_token_ids": (-1,)}),
    ("stop_token_ids", {"stop_token_ids": (VOCAB,)}),
    ("stop_token_ids", {"stop_token_ids": (5,) * 257}),
    ("allowed_token_ids", {"allowed_token_ids": ()}),
    ("allowed_token_ids", {"allowed_token_ids": (2**31,)}),
    ("allowed_token_ids", {"allowed_token_ids": (1,) * (LIMITS.max_allowed_token_ids + 1)}),
    ("logit_bias", {"logit_bias": {-1: 0.0}}),
    ("logit_bias", {"logit_bias": {VOCAB: 0.0}}),
    ("logit_bias", {"logit_bias": {1: 101.0}}),
    ("logit_bias", {"logit_bias": {1: math.nan}}),
    ("logit_bias", {"logit_bias": dict.fromkeys(range(1025), 0.0)}),
    ("logit_bias", {"logit_bias": dict.fromkeys(range(1_024_000), 0.0)}),
    ("bad_words", {"bad_words": ("",)}),
    ("bad_words", {"bad_words": ("x" * 257,)}),
    ("bad_words", {"bad_words": ("x",) * 257}),
    ("bad_words_token_ids", {"bad_words_token_ids": ((),)}),
    ("bad_words_token_ids", {"bad_words_token_ids": ((VOCAB,),)}),
    ("bad_words_token_ids", {"bad_words_token_ids": ((1,) * (LIMITS.max_bad_word_len + 1),)}),
    ("bad_words_token_ids", {"bad_words_token_ids": ((1,),) * (LIMITS.max_bad_word_sequences + 1)}),
    ("extra_args", {"extra_args": {str(i): i for i in range(33)}}),
    ("extra_args", {"extra_args": {"a": "x" * 20_000}}),
    ("extra_args", {"extra_args": {"a": object()}}),
]


@pytest.mark.parametrize("params", ACCEPTED, ids=lambda p: "-".join(p) or "defaults")
def test_values_at_the_limit_are_accepted(params: dict[str, Any]) -> None:
    validate_spec(spec(**params), CARD)


@pytest.mark.parametrize(
    ("param", "params"), REFUSED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(REFUSED)]
)
def test_values_beyond_the_limit_are_refused_by_name(param: str, params: dict[str, Any]) -> None:
    error = refusal(spec(**params))
    assert (error.param, error.code) == (param, "value_out_of_range")
    assert param in error.message


@pytest.mark.parametrize("name", sorted(PARAM_RANGES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_scalar_may_be_non_finite(name: str, value: float) -> None:
    assert refusal(spec(**{name: value})).param == name


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "param"),
    [
        (MAX_LEN - 1, 1, None),
        (MAX_LEN - 1, None, None),
        (MAX_LEN - 1, 2, "max_tokens"),
        (1, MAX_LEN - 1, None),
        (1, MAX_LEN, "max_tokens"),
        (1, 1000 * MAX_LEN, "max_tokens"),
        (MAX_LEN, None, "prompt"),
        (MAX_LEN + 1, 1, "prompt"),
        (1000 * MAX_LEN, 1, "prompt"),
    ],
)
def test_prompt_and_output_must_fit_the_context(
    prompt_len: int, max_tokens: int | None, param: str | None
) -> None:
    case = spec((1,) * prompt_len, max_tokens=max_tokens)
    if param is None:
        validate_spec(case, CARD)
        return
    error = refusal(case)
    assert (error.param, error.code) == (param, "context_length_exceeded")


@pytest.mark.parametrize("token", [-1, VOCAB, HEAD, 2**31, 2**63])
def test_prompt_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    assert refusal(spec((1, token))).param == "prompt"


def test_an_empty_prompt_is_refused() -> None:
    assert refusal(spec(())).param == "prompt"


@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(17, 16), (MAX_LEN, None)])
def test_min_tokens_beyond_max_tokens_is_a_combination_error(min_tokens: int, max_tokens: int | None) -> None:
    error = refusal(spec(min_tokens=min_tokens, max_tokens=max_tokens))
    assert (error.param, error.code) == ("min_tokens", "unsupported_combination")


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("cache_salt", {"cache_salt": "a/b"}),
        ("cache_salt", {"cache_salt": "a\0"}),
        ("cache_salt", {"cache_salt": "a\n"}),
        ("cache_salt", {"cache_salt": "x" * 129}),
        ("priority", {"priority": 2**31}),
        ("priority", {"priority": -(2**31) - 1}),
        ("deadline_ms", {"deadline_ms": 0.0}),
        ("deadline_ms", {"deadline_ms": math.nan}),
        ("slo.ttft_ms", {"slo": SLO(ttft_ms=-1.0)}),
        ("slo.tpot_ms", {"slo": SLO(tpot_ms=math.inf)}),
        ("request_id", {"request_id": ""}),
        ("request_id", {"request_id": "x" * 129}),
        ("tenant", {"tenant": "x" * 129}),
        ("trace", {"trace": "x" * 513}),
        ("attempt", {"attempt": -1}),
        ("prompt", {"segments": (TokenSegment((1,)),) * 4097}),
        ("emitted", {"emitted": ((1,), (1,))}),
        ("emitted", {"emitted": ((1,) * 16,)}),
        ("ended", {"ended": (0,)}),
        ("ended", {"ended": (1,)}),
        ("ended", {"ended": (-1,)}),
        ("emitted", {"emitted": ((HEAD,),)}),
    ],
)
def test_envelope_fields_are_bounded(param: str, more: dict[str, Any]) -> None:
    error = refusal(spec(more=more))
    assert (error.param, error.code) == (param, "value_out_of_range")


@pytest.mark.parametrize(
    "more",
    [
        {"cache_salt": "x" * 128},
        {"priority": -(2**31), "deadline_ms": 1.0, "slo": SLO(ttft_ms=1.0)},
        {"emitted": ((HEAD - 1,) * 15,), "attempt": 3},
    ],
)
def test_envelope_fields_at_the_limit_are_accepted(more: dict[str, Any]) -> None:
    validate_spec(spec(more=more), CARD)


def test_what_is_not_built_is_refused_by_name() -> None:
    adapter = refusal(spec(more={"adapter": "lora"}))
    media = refusal(spec(more={"segments": (MediaSegment("image", b"", 4),)}))
    assert (adapter.code, adapter.param) == ("unsupported_feature", "adapter")
    assert (media.code, media.param) == ("unsupported_feature", "prompt")


def test_messages_never_repeat_what_the_client_sent() -> None:
    secret = "sk-canary"
    for case in (
        spec(stop=(secret, "")),
        spec(more={"cache_salt": secret + "/"}),
        spec(extra_args={secret: object()}),
    ):
        assert secret not in refusal(case).message


def test_max_tokens_none_takes_what_the_context_leaves() -> None:
    assert resolve_max_tokens(SamplingParams(max_tokens=None), num_prompt_tokens=3, max_model_len=10) == 7
    assert resolve_max_tokens(SamplingParams(max_tokens=5), num_prompt_tokens=3, max_model_len=10) == 5


def test_python_callers_get_lists_as_tuples_and_type_errors_by_name() -> None:
    given: Any = SamplingParams
    assert typed_params(given(stop_token_ids=[1, 2], temperature=0)).stop_token_ids == (1, 2)
    for field, value in (("temperature", "hot"), ("n", 2.5), ("n", True), ("logit_bias", {"a": 1.0})):
        with pytest.raises(RequestError) as caught:
            typed_params(given(**{field: value}))
        assert (caught.value.param, caught.value.code) == (field, "invalid_type")


def test_a_decoded_spec_passes_the_same_check() -> None:
    case = spec(logit_bias={3: 1.5}, stop=("a",), seed=-1)
    validate_spec(msgspec.msgpack.decode(msgspec.msgpack.encode(case), type=RequestSpec), CARD)
