"""What placing a request on each instance would mean, in predicted milliseconds: the arithmetic that
the load-aware policies share. They differ in what they make of it.

Where an instance's step cost is not known yet, its peers' is taken, and at a cold start a nominal one: the
order is then that of counts and tokens, and no policy needs a second path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import xxhash

from xllm.cost import StepCost, attention_work, rows_beside
from xllm.service.router.base import InstanceView, RequestView, RouterSnapshot
from xllm.types import PAGE_SIZE

TIER_WEIGHTS = {"device": 1.0, "dram": 0.8, "ssd": 0.5, "remote": 0.3, "expected": 0.7}
"""What a cached token is worth compared with one that is readable at once. "expected" is not there yet,
and its writer may still fail."""

NOMINAL = StepCost((2.0, 0.1, 0.00005, 0.3, 0.0002))
STEP_ROWS = 512
"""Rows that an engine is taken to compute in a step: the default of max_num_batched_tokens."""
DOUBTFUL_ERROR = 0.25
"""A mean relative error from which on a fit is not believed where it differs from the others'."""
MAX_EXPECTED_OUTPUT = 64
"""Of max_tokens, what is counted as work: clients ask for far more than they get."""
TIE_SHARE, MIN_TIE_MS, MAX_TIE_MS = 0.05, 0.5, 5.0
"""Predictions that differ by less than a fit's usual error say nothing. Bounded: of a long queue a twentieth
would hide what a cache saves."""


@dataclass(slots=True, kw_only=True, eq=False)
class Prospect:
    """One instance with room, if the request went there. Built and read within one decision.

    `hit` counts cached prompt tokens, each at its tier's weight. `queue_ms` passes before the request's
    first row, `prefill_ms` then until its first token, `full_prefill_ms` had nothing been cached.
    `tpot_ms` holds once everything placed there decodes. `work_ms` and `full_work_ms` are what the
    instance has to do for it, with and without the cache. `is_fitted`: measured costs, if only borrowed ones.
    """

    view: InstanceView
    num_reqs: int
    hit: float
    queue_ms: float
    prefill_ms: float
    full_prefill_ms: float
    tpot_ms: float
    work_ms: float
    full_work_ms: float
    is_fitted: bool

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def error(self) -> float:
        return self.view.engine.cost_error

    @property
    def ttft_ms(self) -> float:
        return self.queue_ms + self.prefill_ms


def num_requests(view: InstanceView) -> int:
    """Ours that the engine has not heard of yet, or everybody's that it has: whichever is more."""
    return max(view.num_reqs, view.engine.num_requests)


_known = lru_cache(maxsize=1024)(StepCost.known)
"""A cost changes once in many steps and is looked at with every request."""


def prospects_of(request: RequestView, snapshot: RouterSnapshot) -> list[Prospect]:
    """One per instance with room, in the snapshot's order."""
    costs = [_known(view.engine.cost) for view in snapshot.instances]
    is_fitted = any(cost is not None for cost in costs)
    usual = usual_cost(snapshot)
    return [
        _prospect(request, view, _believed(view, cost, usual), is_fitted)
        for view, cost in zip(snapshot.instances, costs, strict=True)
        if view.has_room
    ]


def usual_cost(snapshot: RouterSnapshot) -> StepCost:
    """What a step takes on an instance that has not told its own cost: one that never decodes learns none."""
    known = [cost for cost in (_known(view.engine.cost) for view in snapshot.instances) if cost is not None]
    return _mean(known) if known else _joined(snapshot)


def _joined(snapshot: RouterSnapshot) -> StepCost:
    """Out of halves: where some only compute prompts and the others only decode, nobody knows a whole."""
    told = (_known(view.engine.half_cost) for view in snapshot.instances)
    halves = [half.coefficients for half in told if half is not None]
    prompts, draws = [h for h in halves if h[1] > 0], [h for h in halves if h[3] > 0]
    if not prompts or not draws:
        return NOMINAL
    columns = [*zip(*prompts, strict=True)][:3] + [*zip(*draws, strict=True)][3:]
    means = [sum(column) / len(column) for column in columns]
    # The constant stands in either half; steps of one sequence tell it best.
    means[0] = sum(h[0] for h in draws) / len(draws)
    return StepCost(tuple(means))


def _mean(costs: list[StepCost]) -> StepCost:
    if len(costs) == 1:
        return costs[0]
    columns = zip(*[cost.coefficients for cost in costs], strict=True)
    return StepCost(tuple([sum(column) / len(costs) for column in columns]))


def _believed(view: InstanceView, own: StepCost | None, usual: StepCost) -> StepCost:
    """The instance's own cost as far as its fit can be trusted, else what is usual among its peers.

    Instances of a model are mostly equal. A fit that is often wrong would make one of them look faster
    by chance, and everything new would go there.
    """
    if own is None or own is usual:
        return usual
    doubt = min(1.0, view.engine.cost_error / DOUBTFUL_ERROR)
    if doubt < 0.05:
        return own
    pairs = zip(own.coefficients, usual.coefficients, strict=True)
    return StepCost(tuple([mine + doubt * (theirs - mine) for mine, theirs in pairs]))


def _prospect(request: RequestView, view: InstanceView, cost: StepCost, is_fitted: bool) -> Prospect:
    c0, c1, c2, c3, c4 = cost.coefficients
    engine = view.engine
    # An earlier attempt's output is prompt to the next one.
    num_tokens = request.num_prompt_tokens + request.num_emitted
    hit = weighted_hit(view, num_tokens)
    rows = num_tokens - int(hit)
    # Both counts cover what the engine has accepted; the larger one also covers what is on its way or of
    # other fronts. Their sum would count a request twice.
    backlog = max(view.backlog_tokens, engine.backlog_tokens)
    num_reqs = num_requests(view)
    context = max(view.context_tokens, engine.decode_context)
    # Every step of the prompts ahead, and of this one, also draws for whoever decodes.
    num_decoding = engine.num_decoding
    step_ms = c0 + c3 * num_decoding + c4 * engine.decode_context
    chunk = rows_of_step(cost, num_decoding, engine.decode_context, request.slo.tpot_ms)
    company = engine.decode_context / num_decoding if num_decoding else num_tokens
    num_steps = -(-(backlog + rows) // chunk)
    own_steps = min(num_steps, -(-rows // chunk))
    full_steps = -(-num_tokens // chunk)
    full_attention_ms = c2 * attention_work(0, num_tokens)
    attention_ms = c2 * attention_work(num_tokens - rows, rows) if hit else full_attention_ms
    queue_ms = backlog * (c1 + c2 * company / 2) + (num_steps - own_steps) * step_ms
    if engine.num_running:
        # The step that is running now: half of it is left on average.
        queue_ms += step_ms / 2
    num_out = min(request.max_tokens, MAX_EXPECTED_OUTPUT) * request.num_choices
    decode_work_ms = num_out * (c3 + c4 * num_tokens)
    return Prospect(
        view=view,
        num_reqs=num_reqs,
        hit=hit,
        queue_ms=queue_ms,
        prefill_ms=c1 * rows + attention_ms + own_steps * step_ms,
        full_prefill_ms=c1 * num_tokens + full_attention_ms + full_steps * step_ms,
        tpot_ms=c0
        + c3 * (max(num_reqs, num_decoding) + request.num_choices)
        + c4 * (context + backlog + num_tokens * request.num_choices),
        work_ms=c0 * own_steps + c1 * rows + attention_ms + decode_work_ms,
        full_work_ms=c0 * full_steps + c1 * num_tokens + full_attention_ms + decode_work_ms,
        is_fitted=is_fitted,
    )


def rows_of_step(cost: StepCost, num_decoding: float, decode_context: float, tpot_ms: float | None) -> int:
    """Prompt rows of a step there: engines leave their streams the time per token that was promised. Theirs
    may differ from this one; what is asked for here is taken for everybody's."""
    rows = max(PAGE_SIZE, STEP_ROWS - int(num_decoding))
    if num_decoding <= 0 or tpot_ms is None:
        return rows
    return min(rows, rows_beside(cost, num_decoding, decode_context, tpot_ms))


def weighted_hit(view: InstanceView, num_tokens: int) -> float:
    """Cached tokens, each at its tier's weight; the last token is computed in any case."""
    hit, left = 0.0, max(0, num_tokens - 1)
    for tier, matched in view.matched:
        here = min(matched, left)
        hit += here * TIER_WEIGHTS.get(tier, 0.0)
        left -= here
    return hit


def tie_ms(score: float) -> float:
    return min(MAX_TIE_MS, max(MIN_TIE_MS, TIE_SHARE * abs(score)))


def pick(scored: list[tuple[float, Prospect]], request_id: str) -> Prospect:
    """The best score. Where scores are as good as equal: who got least work lately, then a hash of the
    request and the name, so that fronts with the same picture do not all run to the same instance."""
    best = max(score for score, _ in scored)
    near = [prospect for score, prospect in scored if score >= best - tie_ms(best)]
    if len(near) == 1:
        return near[0]
    return min(
        near, key=lambda p: (p.view.recent_ms, xxhash.xxh3_64_intdigest(f"{request_id}|{p.name}".encode()))
    )
