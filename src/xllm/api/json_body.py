"""JSON from strangers: one reading of a body, or a clear refusal.

Stricter than the parsers around us: duplicate keys, NaN, over-long numbers, deep nesting and
unpaired surrogates are refused here, so no later reader can understand something else.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from xllm.errors import RequestError

MAX_DEPTH = 64
MAX_KEYS = 4096
MAX_CONTAINERS = 100_000
"""Objects and lists in a body: far beyond any conversation, and making millions holds everybody up."""

MAX_INT_DIGITS = 20

# A string (also an unfinished one, so that a scan never starts over: linear time), or a bracket.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[{]|[\]}]', re.DOTALL)
# Whether any integer needs a look; most bodies are then converted by the parser itself.
_ODD_INT = re.compile(rb"[0-9]{19}|-0")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises RequestError: invalid_json, duplicate_key, invalid_unicode, value_out_of_range.
    Messages carry offsets and limits, never content.
    """
    _check_depth(body)
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_float,
            parse_int=_int if _ODD_INT.search(body) else None,
        )
    except UnicodeDecodeError as error:
        raise _invalid(f"The body is not valid UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"The body is not valid JSON (character {error.pos}).") from None
    if not isinstance(value, dict):
        raise _invalid("The body must be a JSON object.")
    if _SURROGATE.search(body):
        _check_surrogates(value)
    return value


def parse_nested(text: str) -> Any:
    """JSON inside a JSON string (a tool call's arguments), by the same rules. Raises RequestError."""
    return parse_object(text.encode("utf-8"))


def _invalid(message: str, code: str = "invalid_json") -> RequestError:
    return RequestError(message, code=code)


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = num_containers = 0
    for match in _STRUCTURE.finditer(body):
        first = match[0][0]
        if first in b"[{":
            depth += 1
            num_containers += 1
            if num_containers > MAX_CONTAINERS:
                raise _invalid(
                    f"The body has more than {MAX_CONTAINERS} objects and lists.", "value_out_of_range"
                )
            if depth > MAX_DEPTH:
                raise _invalid(f"The body nests deeper than {MAX_DEPTH} levels.")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise _invalid(f"An object may have at most {MAX_KEYS} keys.", "value_out_of_range")
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _invalid("An object has the same key twice.", "duplicate_key")
    return value


def _no_constant(_: str) -> NoReturn:
    raise _invalid("NaN and Infinity are not JSON.")


def _float(literal: str) -> float:
    if len(literal) > 64:
        raise _invalid("A number has too many digits.", "value_out_of_range")
    value = float(literal)
    underflow = value == 0.0 and (
        any(c in "123456789" for c in re.split("[eE]", literal)[0]) or literal[0] == "-"
    )
    if not math.isfinite(value) or underflow:
        raise _invalid("A number cannot be represented.", "value_out_of_range")
    return value


def _int(literal: str) -> int:
    # Converting takes quadratic time in the number of digits.
    if len(literal) > MAX_INT_DIGITS or literal == "-0":
        raise _invalid("An integer is out of range.", "value_out_of_range")
    return int(literal)


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid("A string holds an unpaired surrogate.", "invalid_unicode") from None
