"""What it costs to have a request go on elsewhere: the numbers of the two instances and the link between
them, put together for `failover.decision`. Pure."""

from __future__ import annotations

from xllm.service.failover.decision import MoveCost, move_cost
from xllm.service.handover.links import Links
from xllm.service.handover.pair import why_not
from xllm.service.instances.instance import Instance
from xllm.types import PAGE_SIZE


def price(
    source: Instance,
    target: Instance,
    links: Links,
    *,
    num_tokens: int,
    num_matched: int = 0,
    obstacle: str | None = None,
) -> MoveCost:
    """`num_matched` of its tokens are readable at the target; `obstacle` None = ask the pair."""
    return move_cost(
        num_tokens,
        num_matched,
        target.snapshot.cost,
        obstacle=why_not(source, target, num_tokens=num_tokens) if obstacle is None else obstacle,
        page_bytes=source.card.page_bytes,
        page_size=PAGE_SIZE,
        link=links.price(source.name, target.name),
    )
