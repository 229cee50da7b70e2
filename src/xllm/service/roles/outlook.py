"""What times a set of roles is predicted to give under the present demand: the model behind `control`.

A fluid model over the fitted cost of a step: prompts share the instances that take them, streams those
that decode, and on a mixed instance each step pays for both. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.cost import StepCost
from xllm.service.roles.monitor import Demand
from xllm.service.router.base import InstanceView, RouterSnapshot
from xllm.service.router.predict import STEP_ROWS, usual_cost

HORIZON_MS = 2000.0
"""How far ahead a queue that grows is looked at: about what a switch needs to show."""
MAX_LOAD = 0.95
"""Of the capacity; a queue beyond is counted as one that grows, not as one that is infinite."""
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

    `arrival` is ms of prompts arriving per ms; `own_ms` one usual prompt; `backlog_ms` all that wait.
    `tpot_bias`: observed time per token by the predicted one.
    """

    cost: StepCost
    backlog_ms: float
    arrival: float
    own_ms: float
    num_decoding: float
    decode_context: float
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


def work_of(views: Sequence[InstanceView], demand: Demand) -> Work:
    """Sums over all instances of a model. What engines say counts other fronts' work, too."""
    cost = usual_cost(RouterSnapshot(instances=tuple(views), turn=0))
    length = demand.prompt_len or USUAL_PROMPT_LEN
    own_ms = demand.ttft_bias * cost.prefill_ms(max(1, round(length)), max_rows=STEP_ROWS)
    ms_per_token = own_ms / max(1.0, length)
    backlog = sum(max(v.backlog_tokens, v.engine.backlog_tokens) for v in views)
    totals = [v.engine.total_pages for v in views]
    return Work(
        cost=cost,
        backlog_ms=backlog * ms_per_token,
        arrival=demand.prompt_tokens_per_s * ms_per_token / 1000.0,
        own_ms=own_ms,
        num_decoding=sum(v.engine.num_decoding for v in views),
        decode_context=sum(max(v.context_tokens, v.engine.decode_context) for v in views),
        pages_used=sum(v.engine.owned_pages for v in views),
        pages_each=sum(totals) / len(totals) if all(totals) and totals else 0.0,
    )


def outlook(split: Split, work: Work, ttft_slo_ms: float, tpot_slo_ms: float) -> Outlook:
    """`split` has somebody for either phase."""
    cost = work.cost
    c0, c1, _, _, _ = cost.coefficients
    num_decode = split.num_mixed + split.num_decode
    streams, context = work.num_decoding / num_decode, work.decode_context / num_decode
    decode_ms = work.tpot_bias * cost.decode_ms(streams, context)
    rows_ms = max(1e-6, c1 * STEP_ROWS)
    # Of a mixed instance's step, the part that goes to prompts while it also draws for its streams.
    share = (c0 + rows_ms) / (rows_ms + max(c0, decode_ms))
    capacity = split.num_prefill + split.num_mixed * share
    load = min(MAX_LOAD, work.arrival / capacity)
    own_ms = work.own_ms / (1.0 if split.num_prefill else share)
    growth_ms = HORIZON_MS * max(0.0, work.arrival - capacity)
    wait_ms = (work.backlog_ms + growth_ms) / capacity + own_ms * load / (2.0 * (1.0 - load)) / (
        split.num_prefill + split.num_mixed
    )
    tpot_ms = decode_ms
    if split.num_mixed and streams:
        busy = 1.0 if work.backlog_ms > work.own_ms * (split.num_prefill + split.num_mixed) else load
        tpot_ms += busy * rows_ms
    kv = work.pages_used / (num_decode * work.pages_each) / KV_LIMIT if work.pages_each else 0.0
    return Outlook(
        ttft=(wait_ms + own_ms) / ttft_slo_ms,
        tpot=tpot_ms / tpot_slo_ms if work.num_decoding else 0.0,
        kv=kv,
    )
