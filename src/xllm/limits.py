"""The one choke point of request validation: every number a client names is bounded here.

The front calls `validate_spec` before admission, the engine again at ingress, because a peer is
not trusted to have checked. Pure functions over nouns: no I/O, no clock, no policy, no allocation
that grows with an unchecked number. Messages are fixed text with our limits, never the client's
values. Wrong JSON types are the decoder's matter; `typed_params` does the same for Python callers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from xllm.errors import RequestError
from xllm.types import MediaSegment, ModelCard, RequestSpec, SamplingParams

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Closed interval of a scalar; `low_open` leaves the low end out. NaN lies in no range."""

    low: float
    high: float
    low_open: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.low_open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'greater than' if self.low_open else 'at least'} {self.low:g} and at most {self.high:g}"


PARAM_RANGES: dict[str, Range] = {
    "n": Range(low=1, high=16),
    "temperature": Range(low=0.0, high=2.0),
    "top_p": Range(low=0.0, high=1.0, low_open=True),
    "top_k": Range(low=-1, high=INT64_MAX),
    "min_p": Range(low=0.0, high=1.0),
    "presence_penalty": Range(low=-2.0, high=2.0),
    "frequency_penalty": Range(low=-2.0, high=2.0),
    # Not "greater than 0": dividing by less than this overflows float32 logits for no use.
    "repetition_penalty": Range(low=0.01, high=10.0),
    "seed": Range(low=-(2**63), high=INT64_MAX),
    "max_tokens": Range(low=1, high=INT32_MAX),
    "min_tokens": Range(low=0, high=INT32_MAX),
    "logprobs": Range(low=0, high=20),
    "prompt_logprobs": Range(low=0, high=20),
}
"""Scalars of SamplingParams. None (= not given) is always fine where the field allows it.

top_k −1 and 0 mean off; anything at or above the vocabulary is off too, so it needs no upper bound.
"""

SPEC_RANGES: dict[str, Range] = {
    "priority": Range(low=-(2**31), high=INT32_MAX),
    "deadline_ms": Range(low=0.0, high=7 * 86_400_000.0, low_open=True),
    "attempt": Range(low=0, high=INT32_MAX),
}
SLO_RANGE = Range(low=0.0, high=86_400_000.0, low_open=True)
BIAS_RANGE = Range(low=-100.0, high=100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of lists and strings, in entries, characters, tokens or bytes as named."""

    max_stop: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 256
    max_logit_bias: int = 1024
    max_allowed_token_ids: int = 8192
    max_bad_words: int = 256
    max_bad_word_chars: int = 256
    max_bad_word_sequences: int = 1024
    max_bad_word_len: int = 1024
    max_extra_args: int = 32
    max_extra_args_bytes: int = 16 * 1024
    max_segments: int = 4096
    max_id_chars: int = 128
    max_trace_chars: int = 512


LIMITS = Limits()

CACHE_SALT = re.compile(r"[A-Za-z0-9._~+=-]{1,128}")
"""Grammar of a non-empty cache salt; one character class, so matching is linear."""


def refuse(param: str, message: str, code: str = "value_out_of_range") -> RequestError:
    """The error for `param` (a JSON path); raise it. `message` is fixed text that starts with a verb."""
    return RequestError(f"'{param}' {message}.", code=code, param=param)


def validate_spec(spec: RequestSpec, card: ModelCard) -> None:
    """Everything that can be refused without running the request.

    Raises RequestError: `value_out_of_range`, `context_length_exceeded`,
    `unsupported_combination` or `unsupported_feature`, each with `param`.
    `params.max_tokens=None` passes: it means as far as the context allows.
    """
    _unsupported(spec)
    _envelope(spec)
    _prompt(spec, card)
    validate_params(
        spec.params,
        head_width=min(card.head_width, card.vocab_size),
        max_model_len=card.max_model_len,
        num_prompt_tokens=len(spec.prompt_token_ids),
    )
    _emitted(spec, card)


def validate_params(
    params: SamplingParams, *, head_width: int, max_model_len: int, num_prompt_tokens: int = 0
) -> None:
    """Check sampling parameters alone. `head_width` bounds every token id the client names.

    Raises RequestError as `validate_spec`; cheap checks come first, so a hostile size costs nothing.
    """
    for name, allowed in PARAM_RANGES.items():
        _within(name, getattr(params, name), allowed)
    _stop(params)
    _token_ids("stop_token_ids", params.stop_token_ids, head_width, LIMITS.max_stop_token_ids)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise refuse("allowed_token_ids", "must not be empty; leave it out to allow every token")
        _token_ids("allowed_token_ids", params.allowed_token_ids, head_width, LIMITS.max_allowed_token_ids)
    _logit_bias(params, head_width)
    _bad_words(params, head_width)
    _extra_args(params)
    _lengths(params, max_model_len, num_prompt_tokens)


def resolve_max_tokens(params: SamplingParams, *, num_prompt_tokens: int, max_model_len: int) -> int:
    """`max_tokens`, or what the context leaves when it is None. Call after validation."""
    room = max_model_len - num_prompt_tokens
    return room if params.max_tokens is None else min(params.max_tokens, room)


def typed_params(params: SamplingParams) -> SamplingParams:
    """The same parameters with the declared types (lists become tuples), for Python callers.

    Raises RequestError(code="invalid_type") that names the field.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(params), SamplingParams)
    except (msgspec.ValidationError, TypeError, OverflowError, RecursionError) as exc:
        found = re.search(r"`\$\.(\w{1,64})", str(exc))
        param = found.group(1) if found else "sampling_params"
        raise refuse(param, "has the wrong type", code="invalid_type") from exc


def _within(param: str, value: float | None, allowed: Range) -> None:
    if value is not None and not allowed.holds(value):
        raise refuse(param, f"must be {allowed}")


def _at_most(param: str, size: int, limit: int, what: str) -> None:
    if size > limit:
        raise refuse(param, f"must have at most {limit} {what}")


def _token_ids(param: str, ids: Collection[int], width: int, max_ids: int) -> None:
    _at_most(param, len(ids), max_ids, "entries")
    _in_vocabulary(param, ids, width)


def _in_vocabulary(param: str, ids: Iterable[int], width: int) -> None:
    if any(not 0 <= i < width for i in ids):
        raise refuse(param, f"must hold token ids from 0 to {width - 1}")


def _stop(params: SamplingParams) -> None:
    stops = params.stop_strings
    _at_most("stop", len(stops), LIMITS.max_stop, "entries")
    _strings("stop", stops, LIMITS.max_stop_chars)


def _strings(param: str, values: Sequence[str], max_chars: int) -> None:
    if any(not v for v in values):
        raise refuse(param, "must not hold an empty string")
    if any(len(v) > max_chars for v in values):
        raise refuse(param, f"must hold strings of at most {max_chars} characters")


def _logit_bias(params: SamplingParams, width: int) -> None:
    if not params.logit_bias:
        return
    _token_ids("logit_bias", params.logit_bias.keys(), width, LIMITS.max_logit_bias)
    if any(not BIAS_RANGE.holds(v) for v in params.logit_bias.values()):
        raise refuse("logit_bias", f"must hold values {BIAS_RANGE}")


def _bad_words(params: SamplingParams, width: int) -> None:
    _at_most("bad_words", len(params.bad_words), LIMITS.max_bad_words, "entries")
    _strings("bad_words", params.bad_words, LIMITS.max_bad_word_chars)
    words = params.bad_words_token_ids
    _at_most("bad_words_token_ids", len(words), LIMITS.max_bad_word_sequences, "entries")
    for word in words:
        if not word:
            raise refuse("bad_words_token_ids", "must not hold an empty list")
        _token_ids("bad_words_token_ids", word, width, LIMITS.max_bad_word_len)


def _extra_args(params: SamplingParams) -> None:
    if not params.extra_args:
        return
    _at_most("extra_args", len(params.extra_args), LIMITS.max_extra_args, "entries")
    try:
        size = len(msgspec.msgpack.encode(params.extra_args))
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise refuse("extra_args", "must hold plain JSON values") from exc
    _at_most("extra_args", size, LIMITS.max_extra_args_bytes, "bytes when encoded")


def _lengths(params: SamplingParams, max_model_len: int, num_prompt_tokens: int) -> None:
    room = max_model_len - num_prompt_tokens
    if params.max_tokens is not None and params.max_tokens > room:
        raise refuse(
            "max_tokens",
            f"must be at most {room}: the context holds {max_model_len} tokens "
            f"and the prompt takes {num_prompt_tokens}",
            code="context_length_exceeded",
        )
    most = room if params.max_tokens is None else params.max_tokens
    if params.min_tokens > most:
        raise refuse(
            "min_tokens",
            f"must not exceed the {most} tokens that may be generated",
            code="unsupported_combination",
        )


def _unsupported(spec: RequestSpec) -> None:
    if spec.adapter is not None:
        raise refuse("adapter", "is not supported: adapters are not built yet", "unsupported_feature")
    if any(isinstance(s, MediaSegment) for s in spec.segments):
        raise refuse("prompt", "must be text: media input is not built yet", "unsupported_feature")


def _envelope(spec: RequestSpec) -> None:
    for name, allowed in SPEC_RANGES.items():
        _within(name, getattr(spec, name), allowed)
    for name in ("ttft_ms", "tpot_ms", "ttlt_ms"):
        _within(f"slo.{name}", getattr(spec.slo, name), SLO_RANGE)
    if spec.cache_salt and not CACHE_SALT.fullmatch(spec.cache_salt):
        raise refuse("cache_salt", "must be 1 to 128 letters, digits or one of . _ ~ + = -")
    if not 0 < len(spec.request_id) <= LIMITS.max_id_chars:
        raise refuse("request_id", f"must have 1 to {LIMITS.max_id_chars} characters")
    _at_most("tenant", len(spec.tenant), LIMITS.max_id_chars, "characters")
    _at_most("trace", len(spec.trace or ""), LIMITS.max_trace_chars, "characters")
    _at_most("prompt", len(spec.segments), LIMITS.max_segments, "segments")


def _prompt(spec: RequestSpec, card: ModelCard) -> None:
    tokens = spec.prompt_token_ids
    if not tokens:
        raise refuse("prompt", "must hold at least one token")
    if len(tokens) >= card.max_model_len:
        raise refuse(
            "prompt",
            f"must be shorter than the context of {card.max_model_len} tokens; it has {len(tokens)}",
            code="context_length_exceeded",
        )
    _in_vocabulary("prompt", tokens, min(card.head_width, card.vocab_size))


def _emitted(spec: RequestSpec, card: ModelCard) -> None:
    """What an earlier attempt drew: bounded by the head, since a padded row may have been drawn."""
    _at_most("emitted", len(spec.emitted), spec.params.n, "choices")
    most = resolve_max_tokens(
        spec.params, num_prompt_tokens=len(spec.prompt_token_ids), max_model_len=card.max_model_len
    )
    for choice, tokens in enumerate(spec.emitted):
        # An open choice has a token to go; what is complete can be no longer than it was allowed to be.
        _token_ids("emitted", tokens, card.head_width, most if choice in spec.ended else most - 1)
    if list(spec.ended) != sorted(set(spec.ended)) or any(not 0 <= c < spec.params.n for c in spec.ended):
        raise refuse("ended", "must name choices of the request, each once and in order")
    if len(spec.ended) >= spec.params.n:
        raise refuse("ended", "must leave a choice open")
