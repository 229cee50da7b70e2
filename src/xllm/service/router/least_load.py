"""Least load: where a first token is predicted soonest, with some weight on how slowly it then goes on.

Knows nothing of caches: the baseline of the cache-aware policy, and the right one without shared prefixes.
"""

from __future__ import annotations

from xllm.config import FrontConfig
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.router.predict import Prospect, pick, prospects_of

PRESSURE_TOKENS = 16
"""How many tokens' time after the first one counts as well: it moves streams away from instances that decode
many, although a first token would come soon there."""


def load_ms(prospect: Prospect) -> float:
    """What the instance has before it, as a newcomer feels it."""
    return prospect.queue_ms + PRESSURE_TOKENS * prospect.tpot_ms


def least_load(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    prospects = prospects_of(request, snapshot)
    if not prospects:
        return None
    scored = [(-(load_ms(p) + p.full_prefill_ms), p) for p in prospects]
    chosen = pick(scored, request.request_id)
    reasons = (
        f"queue_ms={chosen.queue_ms:.1f}",
        f"prefill_ms={chosen.full_prefill_ms:.1f}",
        f"tpot_ms={chosen.tpot_ms:.1f}",
        f"reqs={chosen.num_reqs}",
        "cost=fitted" if chosen.is_fitted else "cost=nominal",
    )
    return Placement(
        instance=chosen.name,
        reasons=reasons,
        scores=tuple((p.name, round(score, 2)) for score, p in scored),
        ttft_ms=chosen.queue_ms + chosen.full_prefill_ms,
        tpot_ms=chosen.tpot_ms,
        work_ms=chosen.full_work_ms,
    )
