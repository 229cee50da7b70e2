"""GET /instances and GET /requests/{id}: what the front knows of its engines and of single requests.

For administrators (`auth.KeyRing`). Reads snapshots only; formats, decides nothing.
"""

from __future__ import annotations

from typing import Any

from xllm.api.context import Context
from xllm.config.instances import phases_in_order
from xllm.errors import NotFoundError
from xllm.service.instances.about import endpoint_kinds
from xllm.service.snapshot import InstanceSnapshot

MAX_ID_CHARS = 160


def list_instances(context: Context) -> dict[str, Any]:
    """Every instance, and what befell instances lately, newest first."""
    events = context.desk.timelines.instance_events
    return {
        "instances": [_instance(i) for i in context.front.snapshot().instances],
        "events": [
            {
                "at": round(at_s, 3),
                "instance": name,
                "state": state,
                "reason": reason,
                "detect_ms": round(detect_s * 1000, 3),
            }
            for at_s, name, state, reason, detect_s in reversed(events)
        ],
    }


def get_request(context: Context, name: str) -> dict[str, Any]:
    """The timelines of the requests of that name. Raises NotFoundError."""
    found = context.desk.timelines.find(name) if len(name) <= MAX_ID_CHARS else []
    if not found:
        raise NotFoundError(
            "No request of that id is known here; the last few thousand are kept, by each front for itself.",
            code="request_not_found",
        )
    return {"requests": found}


def _instance(i: InstanceSnapshot) -> dict[str, Any]:
    engine = i.engine
    hit_rate = engine.prefix_hits / engine.prefix_queries if engine.prefix_queries else None
    return {
        "id": i.name,
        "model": i.model_id,
        "state": i.state,
        "phases": list(phases_in_order(i.standing.phases)),
        "role": i.standing.role,
        "pool": i.standing.pool,
        "epoch": i.standing.epoch,
        "pid": i.about.pid,
        "incarnation": i.about.incarnation,
        "address": i.about.address,
        "endpoints": list(endpoint_kinds(i.about.endpoints)),
        "restarts": i.about.num_restarts,
        "quiet_ms": round(i.quiet_s * 1000, 3),
        "load": {
            "requests": i.num_requests,
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "own_backlog_tokens": i.backlog_tokens,
            "own_context_tokens": i.context_tokens,
            "inbound": i.num_inbound,
            "backlog_tokens": engine.backlog_tokens,
            "decoding": engine.num_decoding,
            "decode_context": engine.decode_context,
            "pages": {
                "total": engine.total_pages,
                "owned": engine.owned_pages,
                "cached": engine.cached_pages,
                "free": engine.free_pages,
                "in_transfer": engine.transfer_pages,
                "indexed": i.num_indexed_pages,
            },
        },
        "moves": {
            "out": engine.num_moved_out,
            "in": engine.num_moved_in,
            "failed": engine.num_failed_moves,
            "sent_bytes": engine.sent_bytes,
            "received_bytes": engine.received_bytes,
        },
        "hit_rate": None if hit_rate is None else round(hit_rate, 4),
        "preemptions": engine.num_preemptions,
        "steps": engine.step,
        "last_step_ms": round(engine.last_step_ms, 3),
        "cost": list(engine.cost),
        "cost_error": engine.cost_error if engine.cost else None,
    }
