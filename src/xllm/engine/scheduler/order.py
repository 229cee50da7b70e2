"""Orders: who goes first, and who may push whom out. Found by name or entry point.

An order is a pure key over a request; the scheduler does the rest.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol

from xllm.errors import ConfigError
from xllm.types import RequestSpec

GROUP = "xllm.scheduler_orders"


class Order(Protocol):
    """Smaller keys are served first and preempted last. Pure: depends on its arguments only."""

    def key(self, spec: RequestSpec, arrival: int) -> tuple[float, ...]: ...

    def may_displace(self, newcomer: RequestSpec, running: RequestSpec) -> bool:
        """May `newcomer` take the seat of `running` (which is then recomputed later)?"""


class FirstComeFirstServed:
    def key(self, spec: RequestSpec, arrival: int) -> tuple[float, ...]:
        return (arrival,)

    def may_displace(self, newcomer: RequestSpec, running: RequestSpec) -> bool:
        return False


class Priority:
    """Lower `priority` first (vLLM's convention), then arrival."""

    def key(self, spec: RequestSpec, arrival: int) -> tuple[float, ...]:
        return (spec.priority, arrival)

    def may_displace(self, newcomer: RequestSpec, running: RequestSpec) -> bool:
        return newcomer.priority < running.priority


BUILT_IN: dict[str, type[Order]] = {"fcfs": FirstComeFirstServed, "priority": Priority}


def create_order(name: str) -> Order:
    """The order of that name. Raises ConfigError naming the known ones."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    found = {e.name: e for e in entry_points(group=GROUP)}
    if name in found:
        order: Order = found[name].load()()
        return order
    known = ", ".join(sorted({*BUILT_IN, *found}))
    raise ConfigError(f"scheduling_policy: unknown order '{name}'; known: {known}", param="scheduling_policy")
