"""Whether two instances can hand a request over at all: facts of a pair, asked before anything is begun.

Pure. What it would cost is `links`' and `failover.decision`'s matter.
"""

from __future__ import annotations

from xllm.service.failover.decision import SOURCE_GONE
from xllm.service.instances.instance import Instance


def why_not(source: Instance, target: Instance, *, num_tokens: int = 0) -> str:
    """The first reason against moving a request of so many tokens in the end; "" = it can be done.

    Pages of another class or layout would be refused by the engines by name; nobody even asks.
    """
    ours, theirs = source.card, target.card
    if target is source:
        return "same_instance"
    if not source.alive or source.suspect:
        return SOURCE_GONE
    if not target.routable:
        return "target_gone"
    if not source.about.endpoints or not target.about.endpoints:
        return "no_transport"
    if ours.model_id != theirs.model_id:
        return "other_model"
    if ours.numerics_class != theirs.numerics_class:
        return "other_class"
    if (ours.kv_layout_digest, ours.page_size) != (theirs.kv_layout_digest, theirs.page_size):
        return "other_layout"
    if num_tokens > theirs.max_model_len:
        return "too_long"
    return ""
