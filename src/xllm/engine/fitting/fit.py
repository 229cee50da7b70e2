"""From facts and settings to a memory plan, or to a refusal with the numbers and with what would fit.

KV gets all that the rest leaves, up to what can be used: pages are touched when requests need them, so a
large share costs no time at start, and a small one costs recomputation for as long as the engine runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm.config.schema import EngineConfig
from xllm.engine.fitting.plan import MIB, Demand, MemoryPlan, Part, Room, total
from xllm.engine.fitting.remedies import Plan, remedies
from xllm.errors import ConfigError

DemandOf = Callable[[EngineConfig, int], Demand]
"""(settings, max_model_len) → demand: asked again for every remedy that is tried."""

_SPARE_SHARE = 20
"""A twentieth of the room is left alone, for what no part counts: requests, buffers, fragmentation."""
_MIN_SPARE_BYTES = 48 * MIB


def fit(
    config: EngineConfig, max_model_len: int, room: Room, demand_of: DemandOf, before: int | None = None
) -> MemoryPlan:
    """The plan. `before`: pages per group that an earlier engine had, whose content may be used again.

    Raises ConfigError with the table and with settings that would fit, each tried.
    """
    demand = demand_of(config, max_model_len)
    plan = _planned(config, demand, room, before)
    if plan.fits:
        return plan

    def changed(other: EngineConfig, length: int) -> MemoryPlan:
        return _planned(other, demand_of(other, length), room, None)

    raise _refusal(plan, config, max_model_len, changed)


def _planned(config: EngineConfig, demand: Demand, room: Room, before: int | None) -> MemoryPlan:
    engines = max(1, config.platform.num_local_instances)
    spare = max(_MIN_SPARE_BYTES, room.num_bytes // _SPARE_SHARE)
    lasting = (*demand.shared, *_times(demand.own, engines))
    loading = _times(demand.loading, 1 if demand.loads_in_turn else engines)
    fixed = (*lasting, *_times(demand.working, engines))
    left = room.num_bytes - spare - total(fixed)
    num_pages, why = _num_pages(config, demand, max(0, left) // (demand.page_bytes * engines), before)
    each = f"{num_pages} pages of {demand.page_bytes / 1024:.0f} KiB" + ("" if engines == 1 else " in each")
    kv = Part("KV cache", num_pages * demand.page_bytes * engines, f"{each}: {why}")
    return MemoryPlan(
        room=room,
        spare_bytes=spare,
        num_engines=engines,
        parts=(*fixed, kv),
        loading=loading,
        starting_bytes=total(lasting) + total(loading),
        num_pages=num_pages,
        page_bytes=demand.page_bytes,
        num_needed_pages=demand.num_needed_pages,
    )


def _num_pages(config: EngineConfig, demand: Demand, most: int, before: int | None) -> tuple[int, str]:
    """(pages per group, why)."""
    cache = config.cache
    if cache.num_pages is not None:
        return cache.num_pages, f"num_pages={cache.num_pages} as asked"
    if cache.kv_cache_memory_bytes is not None:
        asked = cache.kv_cache_memory_bytes
        return asked // demand.page_bytes, f"kv_cache_memory_bytes={asked} as asked"
    if before is not None:
        return before, "as the engine before this one had, whose pages may be reused"
    if most >= demand.num_useful_pages:
        return demand.num_useful_pages, "all that max_num_seqs × max_model_len can use"
    if most >= demand.num_needed_pages:
        return most, "all that is left"
    # Shown as if it were there, so that the table says how much is missing.
    return demand.num_needed_pages, "one sequence of max_model_len, the least there must be"


def _times(parts: Sequence[Part], count: int) -> tuple[Part, ...]:
    if count == 1:
        return tuple(parts)
    return tuple(Part(p.name, p.num_bytes * count, f"{count} × {p.why}") for p in parts)


def _refusal(plan: MemoryPlan, config: EngineConfig, max_model_len: int, changed: Plan) -> ConfigError:
    table = "\n".join(f"  {line}" for line in plan.lines())
    short = ""
    if plan.num_pages < plan.num_needed_pages:
        short = (
            f"\n  {plan.num_pages} pages hold less than one sequence of max_model_len={max_model_len}, "
            f"which needs {plan.num_needed_pages}"
        )
    found = remedies(config, max_model_len, changed)
    missing = plan.peak_bytes - plan.limit_bytes
    if found:
        remedy = "; or ".join(found)
    elif missing > 0:
        remedy = f"no setting is enough; the least is {-(-missing // MIB)} MiB more memory"
    else:
        remedy = "no setting is enough"
    return ConfigError(
        f"memory: the engine would not fit\n{table}{short}\nfits with: {remedy}",
        param="num_pages" if config.cache.num_pages is not None else "max_model_len",
    )
