"""Whether a running decode had better run elsewhere: one move from the slowest to the fastest, or none. Pure.

A pull towards balance that must not swing: both ends must be better off by a margin, and the move must be
paid back by the tokens still to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.cost import StepCost
from xllm.service.router.base import InstanceView

MARGIN = 0.8
"""The target's time per token after the move, against the source's before it."""
MAX_EXPECTED_OUTPUT = 64
"""Of what a request may still say, what is counted on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A request that decodes: its tokens, its sequences, and how many tokens it may still draw."""

    request_id: str
    num_tokens: int
    num_sequences: int
    num_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """Times per token: the source's before the move, the target's after it."""

    request_id: str
    source: str
    target: str
    source_ms: float
    target_ms: float
    gain_ms: float


def slowest(views: Sequence[InstanceView], slo_tpot_ms: float) -> tuple[InstanceView, float] | None:
    """The instance with the longest predicted time per token, if that misses the objective."""
    timed = [(tpot_ms, view) for view in views if (tpot_ms := _tpot_ms(view)) is not None]
    if not timed:
        return None
    tpot_ms, view = max(timed, key=lambda pair: (pair[0], pair[1].name))
    return (view, tpot_ms) if tpot_ms > slo_tpot_ms else None


def rebalance(
    source: InstanceView, source_ms: float, views: Sequence[InstanceView], running: Sequence[Running]
) -> Rebalance | None:
    """The move off `source` that gains most; None = no move helps. `views` may all take a decode; what the
    move itself costs is for the caller to set against `gain_ms`."""
    best: Rebalance | None = None
    for view in views:
        if view.name == source.name or not view.has_room or "decode" not in view.phases:
            continue
        for request in running:
            target_ms = _tpot_ms(view, request.num_sequences, request.num_tokens)
            if target_ms is None or target_ms > MARGIN * source_ms:
                continue
            gain_ms = (source_ms - target_ms) * min(request.num_left, MAX_EXPECTED_OUTPUT)
            if best is None or gain_ms > best.gain_ms:
                best = Rebalance(
                    request_id=request.request_id,
                    source=source.name,
                    target=view.name,
                    source_ms=source_ms,
                    target_ms=target_ms,
                    gain_ms=gain_ms,
                )
    return best


def _tpot_ms(view: InstanceView, more_sequences: int = 0, more_tokens: int = 0) -> float | None:
    cost, engine = StepCost.known(view.engine.cost), view.engine
    if cost is None:
        return None
    context = max(view.context_tokens, engine.decode_context)
    return cost.decode_ms(engine.num_decoding + more_sequences, context + more_tokens)
