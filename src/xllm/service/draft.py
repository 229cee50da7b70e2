"""What a caller (api, llm) asks of the front before it is a request.

A plain value: tokenised prompt and parameters, nothing resolved yet. The front makes the
`RequestSpec` from it; no checks here.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.types import SLO, RequestClass, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDraft:
    """`model` is any name of `Front.models()`; `deadline_ms` counts from the submission."""

    model: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None
    cls: RequestClass = "online"
    priority: int = 0
    slo: SLO = SLO()
    deadline_ms: float | None = None
    tenant: str = ""
    cache_salt: str = ""
    trace: str | None = None
