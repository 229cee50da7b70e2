"""An open loop over HTTP that ends as soon as its promise cannot be kept any more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.compare.limits import Promise
from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.generator import Target, send
from xllm.cli.bench.metrics import Outcome
from xllm.clock import Clock

CHECK_S = 0.25


async def run_while_kept(
    target: Target, asks: Sequence[Ask], at_s: Sequence[float], clock: Clock, promise: Promise
) -> list[Outcome]:
    """Outcomes of the requests that ended; fewer than `asks` when the run was given up.

    What is under way then is cancelled, which closes its connection.
    """
    origin = clock.monotonic_s()
    outcomes: list[Outcome] = []
    begun_s: dict[asyncio.Task[None], float] = {}

    async def one(ask: Ask) -> None:
        outcomes.append(await send(target, ask, clock, origin))

    async def all_of_them() -> None:
        for ask, planned_s in zip(asks, at_s, strict=True):
            delay = planned_s - (clock.monotonic_s() - origin)
            if delay > 0:
                await asyncio.sleep(delay)
            task = asyncio.create_task(one(ask))
            begun_s[task] = clock.monotonic_s()
            task.add_done_callback(begun_s.pop)
        while begun_s:
            await asyncio.wait(list(begun_s))

    sending = asyncio.create_task(all_of_them())
    output_len = asks[0].output_len
    while not (await asyncio.wait([sending], timeout=CHECK_S))[0]:
        ages_s = [clock.monotonic_s() - since for since in begun_s.values()]
        if promise.broken(outcomes, ages_s, output_len):
            sending.cancel()
            left = [sending, *begun_s]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            return outcomes
    await sending
    return outcomes
