"""Where a request goes on after its first token: the choice that all policies share when roles differ.

Staying saves a transfer, so an instance that also decodes keeps what it can serve well. Else fewest running
tokens, stable pool first, within memory and time per token; never a refusal: the least evil is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.config import FrontConfig
from xllm.cost import StepCost
from xllm.service.router.base import InstanceView, RequestView, RouterSnapshot
from xllm.service.router.predict import MAX_EXPECTED_OUTPUT, num_requests, rows_of_step, usual_cost
from xllm.types import PAGE_SIZE

MARGIN = 1.1
"""A prediction keeps an objective when it does so with this margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeChoice:
    """`instance` None = it stays where its prompt is computed. `why` is a word for the decision log."""

    instance: str | None
    why: str
    tpot_ms: float | None = None


def choose_decode(
    request: RequestView,
    stays_at: InstanceView,
    snapshot: RouterSnapshot,
    config: FrontConfig,
    *,
    in_turn: bool = False,
) -> DecodeChoice:
    """`stays_at` computes its prompt. `in_turn`: the turn picks in the stable pool; loads do not count."""
    if request.max_tokens <= 1:
        return DecodeChoice(instance=None, why="one_token")
    stable = [v for v in snapshot.instances if "decode" in v.phases and not v.old_phases and v.has_room]
    changing = [v for v in snapshot.instances if "decode" in v.phases and v.old_phases and v.has_room]
    if in_turn:
        pool = stable or changing
        if not pool:
            return DecodeChoice(instance=None, why="decode_full")
        return _at(pool[snapshot.turn % len(pool)], stays_at, "turn")
    cost, beside = usual_cost(snapshot), usual_backlog(snapshot)
    limit_ms = request.slo.tpot_ms or config.slo_tpot_ms

    def tpot_ms(view: InstanceView) -> float:
        return predicted_tpot_ms(request, view, cost, limit_ms, beside)

    def keeps(view: InstanceView) -> bool:
        return has_pages(request, view) and MARGIN * tpot_ms(view) <= limit_ms

    def answer(view: InstanceView, why: str) -> DecodeChoice:
        return _at(view, stays_at, why, tpot_ms(view))

    if "decode" in stays_at.phases and keeps(stays_at):
        return answer(stays_at, "stays")
    for pool, why in ((stable, "fewest_tokens"), (changing, "fewest_tokens_in_transition")):
        keeping = [view for view in pool if keeps(view)]
        if keeping:
            return answer(min(keeping, key=lambda v: (running_tokens(v), v.coming_reqs, v.name)), why)
    if not (stable or changing):
        return DecodeChoice(instance=None, why="decode_full")
    least = min(
        (*stable, *changing),
        # Without pages it would have to preempt first, whatever its speed.
        key=lambda v: (not has_pages(request, v), tpot_ms(v), v.name),
    )
    return answer(least, "smallest_miss")


def running_tokens(view: InstanceView) -> int:
    """Tokens that decoding sequences stand on there, or will."""
    return max(view.context_tokens, view.engine.decode_context) + view.coming_tokens


def usual_backlog(snapshot: RouterSnapshot) -> float:
    """Prompt rows that wait at an instance which takes prompts, on average: an idle one does not stay idle
    while the others have queues."""
    taking = [v for v in snapshot.instances if "prefill" in v.phases]
    backlog = sum(max(v.backlog_tokens, v.engine.backlog_tokens) for v in taking)
    return backlog / len(taking) if taking else 0.0


def predicted_tpot_ms(
    request: RequestView, view: InstanceView, cost: StepCost, limit_ms: float, usual_backlog: float = 0.0
) -> float:
    """A step there once everything that it has or expects decodes, this request too.

    Prompts that wait now stand for those that will then be computed beside it.
    """
    own = StepCost.known(view.engine.cost) or cost
    backlog = max(view.backlog_tokens, view.engine.backlog_tokens, usual_backlog)
    per_row_ms = own.coefficients[1] + own.coefficients[2] * request.num_prompt_tokens / 2
    num_tokens = (request.num_prompt_tokens + request.num_emitted) * request.num_choices
    num_decoding = max(num_requests(view), view.engine.num_decoding) + view.coming_reqs + request.num_choices
    context = running_tokens(view) + num_tokens
    beside = min(rows_of_step(own, num_decoding, context, limit_ms), backlog)
    beside_ms = per_row_ms * beside if "prefill" in view.phases else 0.0
    return own.decode_ms(num_decoding, context) + beside_ms


def has_pages(request: RequestView, view: InstanceView) -> bool:
    """Are there pages for the prompt and what is expected of its output, without preempting?"""
    engine = view.engine
    if engine.total_pages == 0:
        return True
    num_out = min(request.max_tokens, MAX_EXPECTED_OUTPUT) * request.num_choices
    num_tokens = request.num_prompt_tokens + request.num_emitted + num_out + view.coming_tokens
    return -(-num_tokens // PAGE_SIZE) <= engine.free_pages + engine.cached_pages


def _at(view: InstanceView, stays_at: InstanceView, why: str, tpot_ms: float | None = None) -> DecodeChoice:
    if view.name == stays_at.name:
        return DecodeChoice(instance=None, why="stays", tpot_ms=tpot_ms)
    return DecodeChoice(instance=view.name, why=why, tpot_ms=tpot_ms)


def decoders(views: Sequence[InstanceView]) -> list[InstanceView]:
    """Those that a request should go on at which has begun to speak already."""
    return [view for view in views if "decode" in view.phases]
