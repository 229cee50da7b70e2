"""One front and its engine processes on this machine: what `xllm serve` and `LLM` both stand on.

Composition only: starts, connects and ends the parts in the right order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from xllm.clock import Clock
from xllm.config import EngineConfig, FrontConfig
from xllm.service.front import Front
from xllm.service.instances.local import LocalEngine
from xllm.service.instances.supervisor import OnEngineProgress, OnUp, Supervisor
from xllm.service.snapshot import FrontObserver
from xllm.types import Phase


class LocalService:
    """A front with loaded engines. Make it with `start` and end it with `close`."""

    def __init__(self, front: Front, supervisor: Supervisor) -> None:
        self.front = front
        self.supervisor = supervisor

    @property
    def engines(self) -> tuple[LocalEngine, ...]:
        """The present engine of every slot that has had one, dead or alive."""
        return tuple(slot.engine for slot in self.supervisor.slots if slot.engine is not None)

    @classmethod
    async def start(
        cls,
        configs: Sequence[EngineConfig],
        front_config: FrontConfig,
        clock: Clock,
        *,
        on_progress: OnEngineProgress = lambda name, stage, elapsed_s: None,
        on_up: OnUp = lambda name, engine: None,
        observer: FrontObserver | None = None,
        log_level: str = "warning",
        roles: Sequence[frozenset[Phase]] = (),
    ) -> LocalService:
        """One engine per config behind a front; returns when the first one takes requests.

        `roles` of the engines at first, one per config; none = all are mixed.

        The others come as they are ready. Engines that die are started again. The calling thread must
        outlive the service (see `LocalEngine.launch`). Raises what launching the first one raises;
        nothing is left running then.
        """
        front = Front(front_config, None, clock, observer=observer)
        supervisor = Supervisor(
            front,
            [_sharing(config, len(configs)) for config in configs],
            front_config,
            clock,
            on_progress=on_progress,
            on_up=on_up,
            log_level=log_level,
            roles=roles,
        )
        service = cls(front, supervisor)
        try:
            await supervisor.start()
        except BaseException:
            await asyncio.shield(service.close())
            raise
        return service

    async def rolling_restart(self) -> None:
        """Replace every engine, one by one, without an error to any request."""
        await self.supervisor.rolling_restart()

    async def close(self, drain_s: float = 0.0) -> bool:
        """Let running requests end within `drain_s`, then end everything; True if none was cut off."""
        complete = await self.front.drain(drain_s)
        await self.front.close()
        await self.supervisor.close()
        return complete


def _sharing(config: EngineConfig, num_engines: int) -> EngineConfig:
    """Each engine takes its part of the cores and of free memory, unless told otherwise."""
    sharers = max(num_engines, config.platform.num_local_instances)
    return replace(config, platform=replace(config.platform, num_local_instances=sharers))
