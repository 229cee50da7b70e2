"""Cache-aware: where the prefix is, unless that instance has more than its share of the work.

A score in milliseconds per candidate: what the cache saves, less what the queue costs. Candidates are the
best matches and always the least loaded of the others, so that a hot prefix can leave its only holder.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.config import FrontConfig
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.router.least_load import load_ms
from xllm.service.router.predict import TIE_MS, Prospect, num_requests, pick, prospects_of

NUM_MATCHES = 3
SHARE_NEW = 1.08
SHARE_BOUND = 1.25
"""Times the mean work that an instance may have got lately and still attract: a request that would find
little there, one that would find all of it. Between the two limits an instance keeps the conversations
it has and gets no new ones: hysteresis without a state to keep."""
GRACE_REQS = 2
"""So many requests beyond the share are no imbalance yet: with few of them the mean says nothing."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What an instance has on average: recent work, requests at this moment."""

    recent_ms: float
    num_reqs: float
    num_instances: int

    def is_over(self, prospect: Prospect, num_tokens: int) -> bool:
        """Would the request carry the instance beyond its share?"""
        matched = prospect.hit / max(1, num_tokens)
        limit = SHARE_NEW + (SHARE_BOUND - SHARE_NEW) * matched
        n, work = self.num_instances, prospect.work_ms
        allowed_ms = limit * (self.recent_ms + work / n) + GRACE_REQS * prospect.full_work_ms
        allowed_reqs = SHARE_BOUND * (self.num_reqs + 1 / n) + GRACE_REQS
        return prospect.view.recent_ms + work > allowed_ms or prospect.num_reqs + 1 > allowed_reqs


def cache_aware(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    prospects = prospects_of(request, snapshot)
    if not prospects:
        return None
    num_tokens = request.num_prompt_tokens + request.num_emitted
    share = _share(snapshot)
    over = {p.name for p in prospects if p.hit and share.is_over(p, num_tokens)}
    scored = [(_score(p, p.name in over), p) for p in _candidates(prospects)]
    chosen = pick(scored, request.request_id)
    hit_ms = chosen.full_prefill_ms - chosen.prefill_ms
    reasons = [
        f"hit_tokens={chosen.hit:.0f}/{num_tokens}",
        f"saved_ms={hit_ms:.1f}",
        f"queue_ms={chosen.queue_ms:.1f}",
        f"tpot_ms={chosen.tpot_ms:.1f}",
        f"recent_ms={chosen.view.recent_ms:.0f}/{share.recent_ms:.0f}",
        "cost=fitted" if chosen.is_fitted else "cost=nominal",
    ]
    if over:
        reasons.append(f"over_share={'+'.join(sorted(over))}")
    return Placement(
        instance=chosen.name,
        reasons=tuple(reasons),
        scores=tuple((p.name, round(score, 2)) for score, p in scored),
        ttft_ms=chosen.ttft_ms,
        tpot_ms=chosen.tpot_ms,
        work_ms=chosen.work_ms,
    )


def _share(snapshot: RouterSnapshot) -> _Share:
    n = len(snapshot.instances)
    return _Share(
        recent_ms=sum(view.recent_ms for view in snapshot.instances) / n,
        num_reqs=sum(num_requests(view) for view in snapshot.instances) / n,
        num_instances=n,
    )


def _score(prospect: Prospect, is_over: bool) -> float:
    """Saved prefill less queue and pressure, from a whole prefill there: instances may differ in speed."""
    prefill_ms = prospect.full_prefill_ms if is_over else prospect.prefill_ms
    return -(prefill_ms + load_ms(prospect))


def _candidates(prospects: list[Prospect]) -> list[Prospect]:
    matches = sorted((p for p in prospects if p.hit > 0), key=lambda p: -p.hit)[:NUM_MATCHES]
    rest = [(load_ms(p) + p.full_prefill_ms, p) for p in prospects if p not in matches]
    if not rest:
        return matches
    least = min(load for load, _ in rest)
    # Several where nothing distinguishes them: `pick` then chooses.
    return matches + [p for load, p in rest if load <= least + TIE_MS]
