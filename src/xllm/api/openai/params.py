"""From the body's sampling and delivery fields to `SamplingParams` and `Delivery`.

Shared by both completion endpoints. Types and spelling only; ranges are judged by the front.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from xllm.api.fields import Fields, as_integer, as_number, as_string, bad_value, wrong_type
from xllm.api.http import Request
from xllm.errors import RequestError
from xllm.limits import LIMITS
from xllm.types import ModelCard, SamplingParams

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How the output is to be told."""

    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool


def read_delivery(fields: Fields) -> Delivery:
    stream = fields.boolean("stream")
    options = fields.obj("stream_options")
    if options is not None and not stream:
        raise bad_value("stream_options", "needs 'stream': true", "unsupported_combination")
    inner = Fields(options or {}, "stream_options")
    return Delivery(
        stream=stream,
        include_usage=inner.boolean("include_usage"),
        continuous_usage=inner.boolean("continuous_usage_stats"),
        return_token_ids=fields.boolean("return_token_ids"),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
    )


def read_sampling(
    fields: Fields,
    card: ModelCard,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Sampling fields; what the body leaves out comes from the model's generation config."""
    given: dict[str, Any] = {
        k: card.generation_config[k] for k in _MODEL_DEFAULTS if k in card.generation_config
    }
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ):
        if (number := fields.number(name)) is not None:
            given[name] = number
    for name in ("n", "top_k", "seed", "min_tokens"):
        if (integer := fields.integer(name)) is not None:
            given[name] = integer
    for name in ("ignore_eos", "include_stop_str_in_output"):
        given[name] = fields.boolean(name)
    return SamplingParams(
        **given,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        stop=_stop(fields),
        stop_token_ids=fields.items("stop_token_ids", as_integer, LIMITS.max_stop_token_ids) or (),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(fields),
        allowed_token_ids=fields.items("allowed_token_ids", as_integer, LIMITS.max_allowed_token_ids),
        bad_words=fields.items("bad_words", as_string, LIMITS.max_bad_words) or (),
    )


def read_cache_salt(fields: Fields) -> str:
    """'' when absent; an empty salt given on purpose is refused, since it would isolate nothing."""
    salt = fields.string("cache_salt")
    if salt == "":
        raise bad_value("cache_salt", "must not be empty", "value_out_of_range")
    return salt or ""


def read_deadline_ms(request: Request) -> float | None:
    """The `x-request-timeout` header, in seconds. Raises RequestError(invalid_value)."""
    values = request.head.values(b"x-request-timeout")
    if not values:
        return None
    text = values[0].decode("latin-1")
    if len(values) > 1 or not _SECONDS.fullmatch(text) or float(text) <= 0:
        raise RequestError(
            "The x-request-timeout header must be a number of seconds.", param="x-request-timeout"
        )
    return float(text) * 1000


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong_type("stop", "a string or a list of strings")
    return Fields({"stop": value}).items("stop", as_string, LIMITS.max_stop) or ()


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    value = fields.obj("logit_bias")
    if value is None:
        return None
    if len(value) > LIMITS.max_logit_bias:
        raise bad_value(
            "logit_bias", f"may have at most {LIMITS.max_logit_bias} entries", "value_out_of_range"
        )
    if not all(_TOKEN_ID.fullmatch(k) for k in value):
        raise bad_value("logit_bias", "must have token ids as keys")
    return {int(k): as_number(v, f"logit_bias.{k}") for k, v in value.items()}
