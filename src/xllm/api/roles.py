"""GET and POST /v1/role (alias /v1/pd_role): which instance is used for what, and changing that by hand.

For administrators. Formats and reads fields; what may be switched is the front's matter.
"""

from __future__ import annotations

from typing import Any

import msgspec

from xllm.api.context import Context
from xllm.api.fields import Fields, as_string, bad_value, too_long, unsupported
from xllm.api.http import Reply, Request
from xllm.config.instances import phases_in_order
from xllm.service.roles.board import Standing

MAX_NAME_CHARS = 160


def list_roles(context: Context) -> dict[str, Any]:
    """Every instance with its role. `epoch` is what a POST must carry to be sure of what it changes."""
    now_s = context.monotonic_s()
    return {
        "instances": [
            {"model": i.model_id, "state": i.state, **_role(i.name, i.standing, now_s)}
            for i in context.front.snapshot().instances
            if i.alive
        ]
    }


async def post_role(context: Context, request: Request, reply: Reply, value: dict[str, Any]) -> None:
    """`{"instance", "role"}`, and `epoch` to change only what was read; `pinned` false leaves the role to
    automatic control. Raises RequestError (409 `conflict`), NotFoundError, UnavailableError."""
    fields = Fields(value)
    name, role = _word(fields, "instance"), _word(fields, "role")
    epoch = fields.integer("epoch")
    pinned = fields.boolean("pinned", default=True)
    if fields.unread():
        raise unsupported(fields.unread()[0], "is not known here")
    if epoch is not None and epoch < 0:
        raise bad_value("epoch", "must not be negative", "value_out_of_range")
    standing = context.front.set_role(name, role, epoch, pinned=pinned)
    await reply.send(200, msgspec.json.encode(_role(name, standing, context.monotonic_s())))


def _word(fields: Fields, name: str) -> str:
    word = as_string(fields.require(name), fields.at(name))
    if len(word) > MAX_NAME_CHARS:
        raise too_long(fields.at(name), MAX_NAME_CHARS, "characters")
    return word


def _role(name: str, standing: Standing, now_s: float) -> dict[str, Any]:
    return {
        "instance": name,
        "role": standing.role,
        "phases": list(phases_in_order(standing.phases)),
        "old_phases": list(phases_in_order(standing.old_phases)),
        "pool": standing.pool,
        "epoch": standing.epoch,
        "reason": standing.reason,
        "since_ms": round(max(0.0, now_s - standing.since_s) * 1000, 3),
        "pinned": standing.pinned,
        "proven": not standing.unproven,
    }
