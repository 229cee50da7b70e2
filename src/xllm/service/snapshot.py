"""Immutable views of the front: what metrics, health checks and tests read.

Values only; the front makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from xllm.service.stream import Delta, Usage
from xllm.types import EngineSnapshot


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
    """Told about each request as it goes; for metrics. Must return at once and never raise."""

    def on_delta(self, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        """Output was committed, `gap_s` after the request's previous output (or its submission)."""

    def on_ended(self, record: RequestRecord) -> None:
        """The request's terminal event."""


class NullObserver:
    def on_delta(self, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        """Nobody looks."""

    def on_ended(self, record: RequestRecord) -> None:
        """Nobody looks."""
