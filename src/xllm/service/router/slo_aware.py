"""SLO-aware: among the instances that are predicted to keep the request's objectives, the one that costs
least work and is fullest already, so that slack stays in one piece for requests that need it.

Never refuses because of an objective: where none is kept the smallest miss is taken, and said.
"""

from __future__ import annotations

from typing import NamedTuple

from xllm.config import FrontConfig
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.router.cache_aware import cache_aware
from xllm.service.router.least_load import load_ms
from xllm.service.router.predict import MAX_EXPECTED_OUTPUT, Prospect, pick, prospects_of
from xllm.types import PAGE_SIZE

MIN_MARGIN = 0.1
"""A prediction keeps an objective when it does so with this margin, or with the fit's own error if larger."""
PACKING = 0.25
"""Of the request's work: what a full instance is preferred by. A cache that saves more than this wins."""


def slo_aware(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    prospects = prospects_of(request, snapshot)
    if not prospects:
        return None
    if not prospects[0].is_fitted:
        placement = cache_aware(request, snapshot, config)
        return placement and _because(placement, "slo=ignored_until_costs_are_known")
    slo = _objectives(request, config)
    uses = {p.name: _use(request, p, slo) for p in prospects}
    if request.cls == "offline":
        return _answer(request, [(-_disturbance(p), p) for p in prospects], uses, slo, "class=offline")
    keeping = [p for p in prospects if uses[p.name] <= 1.0 and _has_pages(request, p)]
    if keeping:
        whole_ms = min(p.full_work_ms for p in keeping)
        scored = [(PACKING * whole_ms * uses[p.name] - p.work_ms, p) for p in keeping]
        return _answer(request, scored, uses, slo, f"slo=kept_by_{len(keeping)}_of_{len(prospects)}")
    # In units of its objective, so a miss by a tenth is a miss by a tenth at every objective. The factor
    # makes differences of five percent ties of `pick`.
    return _answer(
        request, [(-100.0 * _miss(request, p, uses), p) for p in prospects], uses, slo, "slo=missed"
    )


class _Objectives(NamedTuple):
    ttft_ms: float
    tpot_ms: float
    ttlt_ms: float | None


def _objectives(request: RequestView, config: FrontConfig) -> _Objectives:
    return _Objectives(
        ttft_ms=request.slo.ttft_ms or config.slo_ttft_ms,
        tpot_ms=request.slo.tpot_ms or config.slo_tpot_ms,
        ttlt_ms=request.slo.ttlt_ms,
    )


def _use(request: RequestView, prospect: Prospect, slo: _Objectives) -> float:
    """The largest share of an objective that the prediction takes up, margin included; > 1 = not kept."""
    margin = 1.0 + max(MIN_MARGIN, min(prospect.error, 1.0))
    shares = [
        prospect.ttft_ms / slo.ttft_ms,
        prospect.tpot_ms / slo.tpot_ms,
    ]
    if slo.ttlt_ms:
        shares.append((prospect.ttft_ms + request.max_tokens * prospect.tpot_ms) / slo.ttlt_ms)
    return margin * max(shares)


def _miss(request: RequestView, prospect: Prospect, uses: dict[str, float]) -> float:
    """An instance without pages would keep nothing that it promises: it must preempt first."""
    return uses[prospect.name] + (0.0 if _has_pages(request, prospect) else 1.0)


def _has_pages(request: RequestView, prospect: Prospect) -> bool:
    """Are there pages for the prompt and what is expected of its output, without preempting?"""
    engine = prospect.view.engine
    if engine.total_pages == 0:
        return True
    num_out = min(request.max_tokens, MAX_EXPECTED_OUTPUT) * request.num_choices
    num_tokens = request.num_prompt_tokens + request.num_emitted + num_out - int(prospect.hit)
    return -(-num_tokens // PAGE_SIZE) <= engine.free_pages + engine.cached_pages


def _disturbance(prospect: Prospect) -> float:
    """Offline work goes where it delays least: behind a short queue, beside few streams, onto its cache."""
    return load_ms(prospect) * (1 + prospect.num_reqs) + prospect.prefill_ms


def _answer(
    request: RequestView,
    scored: list[tuple[float, Prospect]],
    uses: dict[str, float],
    slo: _Objectives,
    verdict: str,
) -> Placement:
    chosen = pick(scored, request.request_id)
    reasons = (
        verdict,
        f"ttft_ms={chosen.ttft_ms:.1f}/{slo.ttft_ms:.0f}",
        f"tpot_ms={chosen.tpot_ms:.1f}/{slo.tpot_ms:.0f}",
        f"use={uses[chosen.name]:.2f}",
        f"hit_tokens={chosen.hit:.0f}",
        f"cost_error={chosen.error:.2f}",
    )
    return Placement(
        instance=chosen.name,
        reasons=reasons,
        scores=tuple((p.name, round(score, 2)) for score, p in scored),
        ttft_ms=chosen.ttft_ms,
        tpot_ms=chosen.tpot_ms,
        work_ms=chosen.work_ms,
    )


def _because(placement: Placement, reason: str) -> Placement:
    return Placement(
        instance=placement.instance,
        reasons=(reason, *placement.reasons),
        scores=placement.scores,
        ttft_ms=placement.ttft_ms,
        tpot_ms=placement.tpot_ms,
        work_ms=placement.work_ms,
    )
