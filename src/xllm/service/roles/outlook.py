"""What times a set of roles is predicted to give under the present demand: the model behind `control`.

A fluid model over the fitted cost of a step: prompts share the instances that take them, streams those
that decode, and on a mixed instance each step pays for both, prompts within the streams' time per token
(`cost.beside`). Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.cost import StepCost
from xllm.cost.beside import AIM, MIN_SHARE
from xllm.service.roles.monitor import Demand
from xllm.service.router.base import InstanceView, RouterSnapshot
from xllm.service.router.predict import STEP_ROWS, usual_cost

HORIZON_MS = 2000.0
"""How far ahead queues are looked at. One that will have gone by then needs nobody's switch; one that is
still there, or has grown, does."""
MAX_LOAD = 0.95
"""Of the capacity; a queue beyond is counted as one that grows, not as one that is infinite."""
MAX_RANDOM_LOAD = 0.8
"""Up to here arrivals at random are waited for as they say; a queue beyond shows in the backlog, and demand
that was counted for two seconds is not known well enough to divide by what it leaves."""
MAX_DRAWS = 0.99
"""Of a decoder's time; streams beyond are counted as slow, not as infinitely slow."""
KV_LIMIT = 0.9
USUAL_PROMPT_LEN = 256.0
"""Until a prompt has been seen."""


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """How many instances have which role."""

    num_prefill: int
    num_mixed: int
    num_decode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all instances of a model have to do together. Times in ms of one instance that does nothing else.

    `arrival` is ms of prompts arriving per ms; `own_ms` one usual prompt; `backlog_ms` all that wait;
    `rows_ms` what a full step of prompt rows takes beyond an empty one.
    `draws_per_ms` tokens are drawn, each of which takes `draw_ms` beside a step's constant part.
    `tpot_bias`: observed time per token by the predicted one.
    """

    cost: StepCost
    backlog_ms: float
    arrival: float
    own_ms: float
    rows_ms: float
    num_decoding: float
    draws_per_ms: float
    draw_ms: float
    pages_used: float
    pages_each: float
    tpot_bias: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Shares of the objectives that are predicted to be taken up; > 1 = missed."""

    ttft: float
    tpot: float
    kv: float

    @property
    def worst(self) -> float:
        return max(self.ttft, self.tpot, self.kv)


def work_of(
    views: Sequence[InstanceView], demand: Demand, tpots_ms: Sequence[float | None] | None = None
) -> Work:
    """Sums over all instances of a model. What engines say counts other fronts' work, too. `tpots_ms` is the
    time per token that each was seen to give, None = as predicted."""
    cost = usual_cost(RouterSnapshot(instances=tuple(views), turn=0))
    length = demand.prompt_len or USUAL_PROMPT_LEN
    own_ms = cost.prefill_ms(max(1, round(length)), max_rows=STEP_ROWS)
    ms_per_token = own_ms / max(1.0, length)
    backlog = sum(max(v.backlog_tokens, v.engine.backlog_tokens) for v in views)
    num_decoding = sum(v.engine.num_decoding for v in views)
    context = sum(max(v.context_tokens, v.engine.decode_context) for v in views)
    _, _, _, c3, c4 = cost.coefficients
    draws = 0.0
    for view, tpot_ms in zip(views, tpots_ms or [None] * len(views), strict=True):
        engine = view.engine
        step_ms = max(tpot_ms or 0.0, cost.decode_ms(engine.num_decoding, engine.decode_context))
        draws += engine.num_decoding / max(_SMALLEST_MS, step_ms)
    totals = [v.engine.total_pages for v in views]
    return Work(
        cost=cost,
        backlog_ms=backlog * ms_per_token,
        arrival=demand.prompt_tokens_per_s * ms_per_token / 1000.0,
        own_ms=own_ms,
        rows_ms=max(1e-6, ms_per_token * STEP_ROWS - cost.coefficients[0]),
        num_decoding=num_decoding,
        draws_per_ms=draws,
        draw_ms=c3 + c4 * context / max(1, num_decoding),
        pages_used=sum(v.engine.owned_pages for v in views),
        pages_each=sum(totals) / len(totals) if all(totals) and totals else 0.0,
    )


def outlook(split: Split, work: Work, ttft_slo_ms: float, tpot_slo_ms: float) -> Outlook:
    """`split` has somebody for either phase.

    As the router does it, streams stay off instances that take prompts as long as the others suffice.
    """
    if split.num_decode:
        apart = _served(split, work, ttft_slo_ms, tpot_slo_ms, num_mixed_decode=0)
        if not split.num_mixed or max(apart.tpot, apart.kv) <= 1.0:
            return apart
        together = _served(split, work, ttft_slo_ms, tpot_slo_ms, num_mixed_decode=split.num_mixed)
        return min(apart, together, key=lambda reached: reached.worst)
    return _served(split, work, ttft_slo_ms, tpot_slo_ms, num_mixed_decode=split.num_mixed)


def _served(
    split: Split, work: Work, ttft_slo_ms: float, tpot_slo_ms: float, *, num_mixed_decode: int
) -> Outlook:
    """If of the mixed instances so many also decode.

    Streams are counted by the tokens that they draw, not by their number: the same demand stands in more
    streams where steps are longer. Of an instance's time, draws take `draws`, prompts what they have, and the
    rest pays the constant part of each step; so a step lasts c0 ÷ (1 − draws − prompts).
    """
    c0 = max(_SMALLEST_MS, work.tpot_bias * work.cost.coefficients[0])
    num_decode = num_mixed_decode + split.num_decode
    draws = min(MAX_DRAWS, work.tpot_bias * work.draw_ms * work.draws_per_ms / num_decode)
    # What prompts get of a full step is the unit of capacity; of a mixed instance's time it is this:
    full = work.rows_ms / (work.rows_ms + work.cost.coefficients[0])
    decode_ms = c0 / (1.0 - draws)
    aim_ms = min(AIM * tpot_slo_ms, c0 / (1.0 - draws) + work.rows_ms)
    beside = max(1.0 - draws - c0 / aim_ms, MIN_SHARE / (1.0 + MIN_SHARE))
    share = min(1.0, beside / full)
    num_pure = split.num_prefill + split.num_mixed - num_mixed_decode
    num_prefill = split.num_prefill + split.num_mixed
    capacity = num_pure + num_mixed_decode * share
    load = min(MAX_LOAD, work.arrival / capacity)
    own_ms = work.own_ms / (1.0 if num_pure else share)
    left_ms = max(0.0, work.backlog_ms + HORIZON_MS * (work.arrival - capacity))
    random = min(MAX_RANDOM_LOAD, load)
    wait_ms = left_ms / capacity + own_ms * random / (2.0 * (1.0 - random)) / num_prefill
    tpot_ms = decode_ms
    # Prompts become streams: that none runs at this moment does not make their disturbance free.
    has_streams = work.num_decoding > 0 or work.arrival > 0
    if num_mixed_decode and has_streams:
        longest_ms = max(aim_ms, (1.0 + MIN_SHARE) * decode_ms)
        busy = 1.0 if work.backlog_ms > work.own_ms * num_prefill else load
        tpot_ms += busy * (longest_ms - decode_ms)
    kv = work.pages_used / (num_decode * work.pages_each) / KV_LIMIT if work.pages_each else 0.0
    return Outlook(
        ttft=(wait_ms + own_ms) / ttft_slo_ms,
        tpot=tpot_ms / tpot_slo_ms if has_streams else 0.0,
        kv=kv,
    )


_SMALLEST_MS = 1e-3
