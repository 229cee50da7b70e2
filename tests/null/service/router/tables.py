"""Short words for router tables: instances in one line, and the policies' common questions."""

from __future__ import annotations

from xllm.config import FrontConfig
from xllm.service.router.base import InstanceView, Placement, RequestView, RouterPolicy, RouterSnapshot
from xllm.types import SLO, EngineSnapshot

COST = (2.0, 0.1, 0.00005, 0.3, 0.0002)


def instance(
    name: str,
    *,
    reqs: int = 0,
    max_reqs: int | None = 100,
    backlog: int = 0,
    mine: int = 0,
    decoding: int = 0,
    context: int = 0,
    cost: tuple[float, ...] = COST,
    matched: tuple[tuple[str, int], ...] = (),
    recent: float = 0.0,
    num_pages: int = 0,
    free_pages: int = 0,
    error: float = 0.0,
) -> InstanceView:
    """`reqs`, `backlog` by the engine's word, `mine` = backlog by the front's."""
    return InstanceView(
        name=name,
        num_reqs=reqs,
        max_reqs=max_reqs,
        backlog_tokens=mine,
        matched=matched,
        recent_ms=recent,
        engine=EngineSnapshot(
            num_requests=max(reqs, decoding),
            num_running=decoding + bool(backlog),
            backlog_tokens=backlog,
            num_decoding=decoding,
            decode_context=context,
            cost=cost,
            cost_error=error,
            total_pages=num_pages,
            free_pages=free_pages,
        ),
    )


def request(tokens: int = 1000, *, name: str = "r", **fields: object) -> RequestView:
    view = {"request_id": name, "model": "m", "num_prompt_tokens": tokens, "max_tokens": 64, **fields}
    return RequestView(**view)  # type: ignore[arg-type]


def ask(policy: RouterPolicy, view: RequestView, *instances: InstanceView) -> Placement | None:
    snapshot = RouterSnapshot(instances=tuple(sorted(instances, key=lambda i: i.name)), turn=0)
    return policy(view, snapshot, FrontConfig())


def chosen(policy: RouterPolicy, view: RequestView, *instances: InstanceView) -> str | None:
    placement = ask(policy, view, *instances)
    return placement and placement.instance


__all__ = ["COST", "SLO", "ask", "chosen", "instance", "request"]
