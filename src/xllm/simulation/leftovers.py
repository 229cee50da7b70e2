"""What a run leaves behind in its engines and in the front's picture of them, once nothing moves any more.

Looks only; what should not be there is said in words, and nothing is excused.
"""

from __future__ import annotations

import asyncio

from xllm.simulation.cluster import SimCluster
from xllm.simulation.engine import SimEngine

SETTLE_S = 2.5
"""Afterwards, for what is still on its way."""
QUIET_AFTER_S = 60.0
"""Virtual seconds after the last request within which every engine must be idle."""


async def quiet(cluster: SimCluster) -> list[str]:
    """Wait until no living engine holds a request; what they still held after all that time."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + QUIET_AFTER_S
    while loop.time() < end_s:
        if all(_is_quiet(e) for e in cluster.processes if e.alive):
            break
        await asyncio.sleep(0.25)
    await asyncio.sleep(SETTLE_S)
    return [f"{e.name}: {what}" for e in cluster.processes if e.alive for what in held(e)]


def index_faults(cluster: SimCluster) -> list[str]:
    """Where the front's picture of pages differs from the pages, now that nothing moves any more."""
    index = cluster.front.kv_index
    index.check()
    alive = {i.name for i in cluster.front.snapshot().instances if i.alive}
    found = [f"the index still knows pages of {n}" for n in index.instances() if n not in alive]
    for name in sorted(alive):
        engine = cluster.engines[name]
        if engine.alive and index.digests(name) != frozenset(engine.device.core.page_names()):
            found.append(f"the index does not know the pages of {engine.name}")
    return found


def held(engine: SimEngine) -> list[str]:
    """What an engine that should be idle still holds. A crashed one holds nothing any more."""
    found = [f"failed: {engine.failure!r}"] if engine.failure is not None else []
    if not engine.alive and not engine.exited_in_order:
        return found
    counts = engine.device.memory.counts()
    if engine.device.core.has_requests:
        found.append("still has requests")
    elif counts.owned:
        found.append(f"{counts.owned} pages are owned by nobody")
    if counts.in_transfer and engine.alive:
        found.append(f"{counts.in_transfer} pages are held by transfers that are over")
    if counts.free + counts.reusable + counts.owned + counts.in_transfer != counts.total:
        found.append("pages are not conserved")
    return found


def _is_quiet(engine: SimEngine) -> bool:
    """What a peer brought for a request that never came stays for a while, and then must be gone."""
    return not engine.device.core.has_requests and not engine.device.memory.counts().in_transfer
