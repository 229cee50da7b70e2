"""Round-robin: the turn picks an instance, full ones are passed over."""

from __future__ import annotations

from xllm.config import FrontConfig
from xllm.service.router.base import Placement, RequestView, RouterSnapshot


def round_robin(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    instances = snapshot.instances
    for step in range(len(instances)):
        index = (snapshot.turn + step) % len(instances)
        if instances[index].has_room:
            reasons = (f"turn={snapshot.turn}", f"index={index}/{len(instances)}", f"passed_over={step}")
            return Placement(instance=instances[index].name, reasons=reasons)
    return None
