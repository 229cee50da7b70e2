"""Immutable views of the front: what metrics, health checks and tests read.

Values only; the front makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from xllm.service.draft import RequestDraft
from xllm.service.router.base import Placement
from xllm.service.stream import Delta, Usage
from xllm.types import EngineSnapshot, RequestSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSnapshot:
    name: str
    model_id: str
    alive: bool
    num_requests: int
    engine: EngineSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSnapshot:
    """`num_ended` counts requests by how they ended: a finish reason (of choice 0) or an error code."""

    num_inflight_reqs: int
    num_inflight_tokens: int
    draining: bool
    num_accepted: int
    num_refused: int
    num_ended: dict[str, int]
    num_divergences: int
    num_stale_frames: int
    instances: tuple[InstanceSnapshot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One ended request. `outcome` is as in `FrontSnapshot.num_ended`; times in seconds."""

    request_id: str
    model: str
    instance: str
    outcome: str
    finish_reasons: tuple[str | None, ...]
    usage: Usage
    e2e_s: float
    ttft_s: float | None
    queue_s: float


class FrontObserver(Protocol):
    """Told about each request as it goes: metrics, timelines, traces. Must return at once and never raise.

    Order: accepted, placed, (first, delta…), (moved, placed …), ended; an id is never used again.
    """

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        """The request is admitted and about to be sent."""

    def on_refused(self, draft: RequestDraft, code: str) -> None:
        """The request was not admitted; `code` is the error's."""

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        """An instance was chosen for this attempt."""

    def on_first(self, request_id: str, queue_s: float) -> None:
        """Before the first `on_delta`: what the engine says it waited in the queue."""

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        """Output was committed, `gap_s` after the request's previous output (or its submission)."""

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, recompute_tokens: int
    ) -> None:
        """The request goes on elsewhere, `gap_s` after the last sign of progress."""

    def on_instance(self, name: str, state: str, reason: str) -> None:
        """An instance came, changed its state or was lost."""

    def on_ended(self, record: RequestRecord) -> None:
        """The request's terminal event."""


class NullObserver:
    """Nobody looks. Also the base of observers that look at a part."""

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None: ...

    def on_refused(self, draft: RequestDraft, code: str) -> None: ...

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None: ...

    def on_first(self, request_id: str, queue_s: float) -> None: ...

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None: ...

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, recompute_tokens: int
    ) -> None: ...

    def on_instance(self, name: str, state: str, reason: str) -> None: ...

    def on_ended(self, record: RequestRecord) -> None: ...
