"""Whether two instances can hand a request over at all: facts of a pair, asked before anything is begun.

Pure. What it would cost is `links`' and `failover.decision`'s matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from xllm.service.instances.instance import Instance

MAX_ENDPOINTS = 8
_ENDPOINT = re.compile(r"[a-z][a-z0-9+]{0,15}:[\x21-\x7e]{1,240}")


def usable_endpoints(told: Iterable[str]) -> tuple[str, ...]:
    """Of what an instance tells, what may be passed on to its peers: kind:place, short, without blanks."""
    return tuple([e for e in told if _ENDPOINT.fullmatch(e)][:MAX_ENDPOINTS])


def endpoint_kinds(endpoints: Iterable[str]) -> tuple[str, ...]:
    """`tcp`, `unix` …, without the places; each once, best first."""
    return tuple(dict.fromkeys(e.partition(":")[0] for e in endpoints))


def why_not(source: Instance, target: Instance, *, num_tokens: int = 0) -> str:
    """The first reason against moving a request of so many tokens in the end; "" = it can be done.

    Pages of another class or layout would be refused by the engines by name; nobody even asks.
    """
    ours, theirs = source.card, target.card
    if target is source:
        return "same_instance"
    if not source.alive or source.suspect:
        return "source_gone"
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
