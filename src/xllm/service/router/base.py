"""What a router policy sees and answers: plain values and one function type.

A policy is a pure function; it holds no state, reads no clock, and changes nothing. Whatever
varies between two calls (the turn, the load) stands in the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm.config import FrontConfig
from xllm.types import MIXED, SLO, EngineSnapshot, Phase, RequestClass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """What placing a request may depend on. `num_emitted` > 0: an earlier attempt got that far."""

    request_id: str
    model: str
    num_prompt_tokens: int
    num_choices: int = 1
    max_tokens: int = 16
    cls: RequestClass = "online"
    priority: int = 0
    slo: SLO = SLO()
    attempt: int = 0
    num_emitted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance that may take the request: alive, not suspect, not draining, of the request's model.

    `num_reqs`, `backlog_tokens` and `context_tokens` are this front's own: placed and not ended, prompt
    rows of those that have not answered yet, tokens of those that have. `engine` is the engine's own
    word, at most a step old, and counts other fronts' requests too. `matched` is (tier, leading prompt
    tokens readable there), best tier first; the tier "expected" stands for pages that requests placed there
    a moment ago will leave. `recent_ms` is the work that this front placed there lately (`memory.py`).
    `max_reqs` None = it does not say. `phases` is its role: what it may be given. `old_phases` it had before
    and still works off; empty = it is in a stable pool. `coming_reqs` of `coming_tokens` run their prompts
    elsewhere and are to go on here.
    """

    name: str
    num_reqs: int
    max_reqs: int | None
    engine: EngineSnapshot
    backlog_tokens: int = 0
    context_tokens: int = 0
    matched: tuple[tuple[str, int], ...] = ()
    recent_ms: float = 0.0
    phases: frozenset[Phase] = MIXED
    old_phases: frozenset[Phase] = frozenset()
    coming_reqs: int = 0
    coming_tokens: int = 0

    @property
    def has_room(self) -> bool:
        if self.max_reqs is None:
            return True
        return max(self.num_reqs, self.engine.num_requests) + self.coming_reqs < self.max_reqs


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSnapshot:
    """`instances` are sorted by name and never empty; `turn` counts decisions for this model."""

    instances: tuple[InstanceView, ...]
    turn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`instance` is a name of the snapshot; `decode` another one where the request goes on after its first
    token, None = it stays; `reasons` and `scores` (per candidate, higher is better) are
    for the decision log and `xllm explain`. Predictions are None where the policy makes none; `work_ms` is
    what the request adds to its instance's work, 0 where nothing is predicted."""

    instance: str
    reasons: tuple[str, ...]
    scores: tuple[tuple[str, float], ...] = ()
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    work_ms: float = 0.0
    decode: str | None = None


RouterPolicy = Callable[[RequestView, RouterSnapshot, FrontConfig], Placement | None]
"""None = no instance has room: the request is refused with 429."""
