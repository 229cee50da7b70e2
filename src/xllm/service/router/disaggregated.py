"""Placement when instances have roles: one policy for the prompt, one shared choice of where to decode.

Wraps a policy, so that no policy (a user's neither) needs to know of roles: it is asked about a pool of
instances as if there were no others. With all instances mixed it is asked exactly as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from xllm.config import FrontConfig
from xllm.service.router.base import InstanceView, Placement, RequestView, RouterPolicy, RouterSnapshot
from xllm.service.router.decode import choose_decode, decoders
from xllm.service.router.predict import usual_cost
from xllm.service.router.round_robin import round_robin
from xllm.types import MIXED, PREFILL


def place(
    policy: RouterPolicy, request: RequestView, snapshot: RouterSnapshot, config: FrontConfig
) -> Placement | None:
    """The policy's placement, with `decode` where the request is to go on. None = no instance has room."""
    if all(view.phases == MIXED and not view.old_phases for view in snapshot.instances):
        return policy(request, snapshot, config)
    snapshot = _with_costs(snapshot)
    if request.num_emitted:
        # It has spoken already, so somebody waits for its next token: recomputed and continued in one place.
        return _first_with_room(policy, request, snapshot, config, (decoders(snapshot.instances),), "resumed")
    placed = _place_prompt(policy, request, snapshot, config)
    if placed is None:
        return None
    stays_at = next((v for v in snapshot.instances if v.name == placed.instance), None)
    if stays_at is None:
        return placed  # a policy's invention; the caller refuses it
    choice = choose_decode(request, stays_at, snapshot, config, in_turn=policy is round_robin)
    return replace(
        placed,
        decode=choice.instance,
        tpot_ms=choice.tpot_ms if choice.instance is not None else placed.tpot_ms,
        reasons=(*placed.reasons, f"decode={choice.instance or placed.instance}:{choice.why}"),
    )


def _with_costs(snapshot: RouterSnapshot) -> RouterSnapshot:
    """One that never decodes, or never computes a prompt, cannot tell what a step takes: it is told what is
    usual among all, since a policy sees only its pool."""
    if all(view.engine.cost for view in snapshot.instances) or not any(
        view.engine.cost or view.engine.half_cost for view in snapshot.instances
    ):
        return snapshot
    usual = usual_cost(snapshot).coefficients
    views = (
        view if view.engine.cost else replace(view, engine=msgspec.structs.replace(view.engine, cost=usual))
        for view in snapshot.instances
    )
    return replace(snapshot, instances=tuple(views))


def _place_prompt(
    policy: RouterPolicy, request: RequestView, snapshot: RouterSnapshot, config: FrontConfig
) -> Placement | None:
    """Those for prompts alone; if the first token is predicted late there, also mixed ones, whose streams it
    would disturb; then also those in transition."""
    taking = [v for v in snapshot.instances if "prefill" in v.phases]
    stable = [v for v in taking if not v.old_phases]
    alone = [v for v in stable if v.phases == PREFILL]
    pools = [pool for pool in (alone, stable, taking) if pool]
    placed = _first_with_room(policy, request, snapshot, config, pools, "prefill")
    if placed is not None and placed.ttft_ms is None and len(stable) > len(alone):
        # It predicts nothing, so nothing would ever tell that those for prompts alone are overrun.
        return _first_with_room(policy, request, snapshot, config, (stable, taking), "prefill")
    limit_ms = request.slo.ttft_ms or config.slo_ttft_ms
    for pool in pools:
        if placed is None or placed.ttft_ms is None or placed.ttft_ms <= limit_ms:
            break
        wider = policy(request, replace(snapshot, instances=tuple(pool)), config)
        if wider is not None and wider.ttft_ms is not None and wider.ttft_ms < placed.ttft_ms:
            placed = replace(wider, reasons=(*wider.reasons, f"pool={len(pool)}_of_{len(taking)}"))
    return placed


def _first_with_room(
    policy: RouterPolicy,
    request: RequestView,
    snapshot: RouterSnapshot,
    config: FrontConfig,
    pools: Sequence[Sequence[InstanceView]],
    purpose: str,
) -> Placement | None:
    """Ask pool by pool; at last everybody: each instance can do everything, and a refusal helps nobody."""
    for pool in pools:
        placed = policy(request, replace(snapshot, instances=tuple(pool)), config) if pool else None
        if placed is not None:
            return placed
    placed = policy(request, snapshot, config)
    return placed and replace(placed, reasons=(*placed.reasons, f"pool=none_for_{purpose}"))
