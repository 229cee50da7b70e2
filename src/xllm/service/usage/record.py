"""What is recorded of an ended request, and what can be asked about many. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """`request_id` is ours and unique; `client_id` is the client's own name for the request, if echoable.

    `key_id` names the API key without telling it ('' = none was needed). `created_s` is Unix time at the
    submission. `outcome` is a finish reason or an error's code.
    """

    request_id: str
    client_id: str
    key_id: str
    tenant: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    outcome: str
    num_attempts: int
    created_s: float
    duration_s: float
    front_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """Totals by key and model of requests created in [since_s, until_s); None = no limit.

    `after` is the (key_id, model) of the last row of the page before; at most `limit` rows come.
    """

    since_s: float | None = None
    until_s: float | None = None
    key_id: str | None = None
    model: str | None = None
    after: tuple[str, str] | None = None
    limit: int = MAX_PAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """`num_failed` requests ended with an error or were aborted; their tokens count like any others."""

    key_id: str
    model: str
    num_requests: int
    num_failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsagePage:
    """In the order of (key_id, model); `more` = ask again after the last row."""

    rows: tuple[Totals, ...]
    more: bool
