"""Immutable views of the front: what metrics, health checks and tests read.

Values only; the front makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from xllm.service.draft import RequestDraft
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceAbout, InstanceState
from xllm.service.roles.board import UNLISTED, Standing
from xllm.service.router.base import Placement
from xllm.service.stream import Delta, Usage
from xllm.types import EngineSnapshot, RequestSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSnapshot:
    """`quiet_s` is the time since its last sign of progress; `num_indexed_pages` it is known to hold.
    `num_inbound` requests are being moved there."""

    name: str
    model_id: str
    alive: bool
    num_requests: int
    engine: EngineSnapshot
    state: InstanceState = "ready"
    about: InstanceAbout = InstanceAbout()
    backlog_tokens: int = 0
    context_tokens: int = 0
    quiet_s: float = 0.0
    num_indexed_pages: int = 0
    num_inbound: int = 0
    standing: Standing = UNLISTED


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSnapshot:
    """`num_ended` counts requests by how they ended: a finish reason (of choice 0) or an error code.

    `num_waiting` requests have no instance now. `num_moves` (taken off an instance) are counted by why,
    `num_deaths` of instances by cause (`failover.blame.DeathCause`). `num_handovers` (pages taken along) are
    counted by reason and outcome (`handover.record`), `num_transfer_failures` by code; `num_moving` are
    under way.
    """

    num_inflight_reqs: int
    num_inflight_tokens: int
    draining: bool
    num_accepted: int
    num_refused: int
    num_ended: dict[str, int]
    num_divergences: int
    num_stale_frames: int
    num_waiting: int
    num_moves: dict[str, int]
    num_deaths: dict[str, int]
    num_suspicions: int
    num_quarantined: int
    num_nonexact_resumes: int
    num_kv_gaps: int
    num_moving: int
    num_handovers: dict[tuple[str, str], int]
    num_transfer_failures: dict[str, int]
    num_prefix_fetches: int
    instances: tuple[InstanceSnapshot, ...]
    num_role_switches: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    """By (from, to, reason)."""


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
    prefill_ms: float = 0.0
    num_attempts: int = 1
    num_moves: int = 0
    num_handovers: int = 0
    num_preemptions: int = 0
    nonexact: bool = False


class FrontObserver(Protocol):
    """Told about each request and instance as it goes; must return at once and never raise.

    Derive from NullObserver, so that an event that is new says nothing to you instead of breaking you.
    """

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        """The request is admitted and about to be placed."""

    def on_refused(self, draft: RequestDraft, code: str) -> None:
        """The request was not admitted; `code` is the error's."""

    def on_first(self, request_id: str, queue_s: float) -> None:
        """Before the first `on_delta`: how long the engine says it waited in its queue."""

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        """Output was committed, `gap_s` after the request's previous output (or its submission)."""

    def on_ended(self, record: RequestRecord) -> None:
        """The request's terminal event."""

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        """The request was sent to an instance."""

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        """It was sent to `target` since it could not stay at `source`, `gap_s` after its last output.

        `cause`: lost, suspect, drain or removed. `recompute_tokens` counts before any prefix hit.
        """

    def on_handover(self, record: HandoverRecord) -> None:
        """An order to hand a request over has its outcome; one that is `done` is placed next."""

    def on_resumed(self, request_id: str, instance: str, gap_s: float) -> None:
        """The first output after one or more moves, and how long its client waited for it."""

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        """The instance is in this state now; found out `detect_s` after its last progress."""

    def on_role(self, name: str, old: str, new: str, reason: str, numbers: str) -> None:
        """The instance has another role from now on; `numbers` are what the decision was made from."""


class NullObserver:
    """Nobody looks. The base of observers that look at a part."""

    def on_accepted(self, draft: RequestDraft, spec: RequestSpec) -> None:
        return

    def on_refused(self, draft: RequestDraft, code: str) -> None:
        return

    def on_first(self, request_id: str, queue_s: float) -> None:
        return

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        return

    def on_ended(self, record: RequestRecord) -> None:
        return

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        return

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        return

    def on_handover(self, record: HandoverRecord) -> None:
        return

    def on_resumed(self, request_id: str, instance: str, gap_s: float) -> None:
        return

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        return

    def on_role(self, name: str, old: str, new: str, reason: str, numbers: str) -> None:
        return
