"""What a router policy sees and answers: plain values and one function type.

A policy is a pure function; it holds no state, reads no clock, and changes nothing. Whatever
varies between two calls (the turn, the load) stands in the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm.config import FrontConfig
from xllm.types import SLO, EngineSnapshot, RequestClass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """What placing a request may depend on."""

    request_id: str
    model: str
    num_prompt_tokens: int
    num_choices: int = 1
    cls: RequestClass = "online"
    priority: int = 0
    slo: SLO = SLO()
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One live instance that serves the request's model. `max_reqs` None = it does not say."""

    name: str
    num_reqs: int
    max_reqs: int | None
    engine: EngineSnapshot

    @property
    def has_room(self) -> bool:
        return self.max_reqs is None or self.num_reqs < self.max_reqs


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSnapshot:
    """`instances` are sorted by name and never empty; `turn` counts decisions for this model."""

    instances: tuple[InstanceView, ...]
    turn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`instance` is a name of the snapshot; `reasons` are for the decision log."""

    instance: str
    reasons: tuple[str, ...]


RouterPolicy = Callable[[RequestView, RouterSnapshot, FrontConfig], Placement | None]
"""None = no instance has room: the request is refused with 429."""
