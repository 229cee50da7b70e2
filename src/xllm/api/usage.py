"""GET /usage: totals by key and model. An administrator sees all keys, everybody else their own."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import parse_qsl

from xllm.api.caller import Caller
from xllm.errors import AccessError, NotFoundError, RequestError
from xllm.service.usage import UsageQuery, UsageStore
from xllm.service.usage.record import MAX_PAGE, Totals

_NAMES = ("since", "until", "key", "model", "limit", "after_key", "after_model")
MAX_VALUE_CHARS = 256


async def read_usage(store: UsageStore, caller: Caller, query: str) -> dict[str, Any]:
    """The answer's body. Raises AccessError, RequestError, NotFoundError (nothing is recorded)."""
    if not caller.is_admin and not caller.key_id:
        raise AccessError("Usage is shown to API keys and administrators.", code="permission_denied")
    asked = read_query(query)
    if not caller.is_admin:
        if asked.key_id not in (None, caller.key_id):
            raise AccessError("Usage of other keys is for administrators.", code="permission_denied")
        asked = UsageQuery(
            since_s=asked.since_s,
            until_s=asked.until_s,
            key_id=caller.key_id,
            model=asked.model,
            after=asked.after,
            limit=asked.limit,
        )
    page = await store.totals(asked)
    if page is None:
        raise NotFoundError("Usage is not recorded here; the setting usage_db turns it on.", code="usage_off")
    last = page.rows[-1] if page.more and page.rows else None
    return {
        "object": "list",
        "data": [_row(r) for r in page.rows],
        "has_more": page.more,
        "next": None if last is None else {"after_key": last.key_id, "after_model": last.model},
    }


def read_query(query: str) -> UsageQuery:
    """Raises RequestError naming the parameter."""
    try:
        pairs = (
            parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=8) if query else []
        )
    except ValueError:
        raise RequestError("The query string is not valid.", code="invalid_value") from None
    given: dict[str, str] = {}
    for name, value in pairs:
        if name not in _NAMES:
            known = ", ".join(_NAMES)
            raise RequestError(f"The query may hold: {known}.", code="unknown_parameter", param="query")
        if name in given or len(value) > MAX_VALUE_CHARS:
            raise _bad(name, "must be given once and be short")
        given[name] = value
    return UsageQuery(
        since_s=_time(given, "since"),
        until_s=_time(given, "until"),
        key_id=given.get("key"),
        model=given.get("model"),
        after=_after(given),
        limit=_limit(given),
    )


def _time(given: dict[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        value = float(given[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _bad(name, "must be a Unix time in seconds")
    return value


def _limit(given: dict[str, str]) -> int:
    text = given.get("limit", str(MAX_PAGE))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or not 1 <= int(text) <= MAX_PAGE:
        raise _bad("limit", f"must be a number from 1 to {MAX_PAGE}")
    return int(text)


def _after(given: dict[str, str]) -> tuple[str, str] | None:
    if ("after_key" in given) != ("after_model" in given):
        raise _bad("after_key", "goes with after_model")
    return (given["after_key"], given["after_model"]) if "after_key" in given else None


def _bad(name: str, what: str) -> RequestError:
    return RequestError(f"The query parameter '{name}' {what}.", param=name)


def _row(totals: Totals) -> dict[str, Any]:
    return {
        "key": totals.key_id,
        "model": totals.model,
        "requests": totals.num_requests,
        "failed": totals.num_failed,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "completion_tokens": totals.completion_tokens,
    }
