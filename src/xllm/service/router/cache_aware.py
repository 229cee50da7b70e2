"""Cache-aware: where the prefix is, unless that instance has more than its share of the work.

A score in milliseconds per candidate: what the cache saves, less what the queue costs. Candidates are the
best matches and always the least loaded of the others, so that a hot prefix can leave its only holder.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.config import FrontConfig
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.router.least_load import load_ms
from xllm.service.router.predict import Prospect, num_requests, pick, prospects_of, tie_ms

NUM_MATCHES = 3
MAX_SHARE = 1.1
GRACE_MOVES = 6
"""An instance attracts until its recent work is `MAX_SHARE` times the mean, and beyond that by so many times
what it would cost to have this request elsewhere. So it stops taking what is cheap to have elsewhere (a new
conversation under a prompt that others hold, too) long before it lets go of a conversation that only it
knows: hysteresis without a state to keep. A lone conversation moves once in some forty turns."""
MAX_REQS_SHARE, GRACE_REQS = 1.25, 2
"""The same for requests in flight. With few of them the mean says nothing, hence the two."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What an instance has on average: recent work, requests at this moment."""

    recent_ms: float
    num_reqs: float
    num_instances: int

    def is_over(self, prospect: Prospect, elsewhere_ms: float) -> bool:
        """Would the request be too much for the instance? `elsewhere_ms` is its work at another one."""
        n, work = self.num_instances, prospect.work_ms
        move_ms = max(0.0, elsewhere_ms - work)
        allowed_ms = MAX_SHARE * (self.recent_ms + work / n) + GRACE_MOVES * move_ms
        allowed_reqs = MAX_REQS_SHARE * (self.num_reqs + 1 / n) + GRACE_REQS
        # One request's own work is no imbalance.
        return prospect.view.recent_ms > allowed_ms or prospect.num_reqs + 1 > allowed_reqs


def cache_aware(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    prospects = prospects_of(request, snapshot)
    if not prospects:
        return None
    num_tokens = request.num_prompt_tokens + request.num_emitted
    share = _share(snapshot)
    over = _over_share(prospects, share)
    scored = [(_score(p, p.name in over), p) for p in _candidates(prospects, over)]
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


def _over_share(prospects: list[Prospect], share: _Share) -> set[str]:
    works = sorted(p.work_ms for p in prospects)
    if len(works) < 2:
        return set()
    return {p.name for p in prospects if share.is_over(p, works[1] if p.work_ms == works[0] else works[0])}


def _score(prospect: Prospect, is_over: bool) -> float:
    """Saved prefill less queue and pressure, from a whole prefill there: instances may differ in speed.

    One that is over its share saves nothing, and counts as if it had to compute the prompt twice: it is
    still taken where all others have long queues.
    """
    prefill_ms = 2 * prospect.full_prefill_ms if is_over else prospect.prefill_ms
    return -(prefill_ms + load_ms(prospect))


def _candidates(prospects: list[Prospect], over: set[str]) -> list[Prospect]:
    matches = sorted((p for p in prospects if p.hit > 0), key=lambda p: -p.hit)[:NUM_MATCHES]
    rest = [(-_score(p, p.name in over), p) for p in prospects if p not in matches]
    if not rest:
        return matches
    least = min(load for load, _ in rest)
    # Several where nothing distinguishes them: `pick` then chooses.
    return matches + [p for load, p in rest if load <= least + tie_ms(least)]
