"""Router policies by name: the built-in table, then entry points of `xllm.router_policies`."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import entry_points

from xllm.errors import ConfigError
from xllm.service.router.base import RouterPolicy
from xllm.service.router.cache_aware import cache_aware
from xllm.service.router.least_load import least_load
from xllm.service.router.round_robin import round_robin
from xllm.service.router.slo_aware import slo_aware

GROUP = "xllm.router_policies"

_BUILT_IN: dict[str, RouterPolicy] = {
    "round-robin": round_robin,
    "least-load": least_load,
    "cache-aware": cache_aware,
    "slo-aware": slo_aware,
}


def load_policy(name: str) -> RouterPolicy:
    """The policy of that name; ConfigError names the known ones."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        known = sorted({*_BUILT_IN, *found})
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise ConfigError(f"router_policy={name!r} is not known; {hint}", param="router_policy")
    policy = found[name].load()
    if not callable(policy):
        raise ConfigError(f"router_policy={name!r}: its entry point is not a function", param="router_policy")
    typed: RouterPolicy = policy
    return typed
