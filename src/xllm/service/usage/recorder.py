"""From the front's events to usage records. An observer: it sees each accepted request end exactly once."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.clock import Clock
from xllm.service.draft import RequestDraft
from xllm.service.snapshot import NullObserver, RequestRecord
from xllm.service.usage.record import UsageRecord
from xllm.service.usage.store import UsageStore
from xllm.types import RequestSpec


@dataclass(frozen=True, slots=True)
class _Begun:
    client_id: str
    tenant: str
    created_s: float


class UsageRecorder(NullObserver):
    """Keeps three facts for each live request; live requests are bounded by admission."""

    def __init__(self, store: UsageStore, clock: Clock, *, front_id: str) -> None:
        self._store = store
        self._clock = clock
        self._front_id = front_id
        self._begun: dict[str, _Begun] = {}

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        self._begun[spec.request_id] = _Begun(draft.client_id, draft.tenant, self._clock.wall_s())

    def on_ended(self, record: RequestRecord) -> None:
        begun = self._begun.pop(record.request_id, None)
        if begun is None:
            # Accepted before anybody listened; what is not known stays empty, the tokens count.
            begun = _Begun("", "", self._clock.wall_s() - record.e2e_s)
        self._store.add(
            UsageRecord(
                request_id=record.request_id,
                client_id=begun.client_id,
                # A tenant is a key until keys can be grouped.
                key_id=begun.tenant,
                tenant=begun.tenant,
                model=record.model,
                prompt_tokens=record.usage.prompt_tokens,
                cached_tokens=record.usage.cached_tokens,
                completion_tokens=record.usage.completion_tokens,
                outcome=record.outcome,
                num_attempts=record.num_attempts,
                created_s=begun.created_s,
                duration_s=record.e2e_s,
                front_id=self._front_id,
            )
        )
