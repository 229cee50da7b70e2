"""What a caller (api, llm) asks of the front before it is a request.

A plain value: tokenised prompt and parameters, nothing resolved yet. The front makes the
`RequestSpec` from it; no checks here.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.types import SLO, RequestClass, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDraft:
    """`model` is any name of `Front.models()`; `deadline_ms` counts from the submission.

    `client_id` is the client's name for the request, safe to echo and never a key of ours; `received_s` is
    when its first byte was read, on the front's clock. `trace` is the traceparent of the request's own span
    and `trace_parent` the id of the span it hangs under, both None when nobody traces it.
    """

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
    client_id: str = ""
    received_s: float | None = None
    trace: str | None = None
    trace_parent: str | None = None
