"""One front and its engine processes on this machine: what `xllm serve` and `LLM` both stand on.

Composition only: starts, connects and ends the parts in the right order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from xllm.clock import Clock
from xllm.config import EngineConfig, FrontConfig
from xllm.service.front import Front
from xllm.service.instances.handshake import OnProgress, ignore_progress
from xllm.service.instances.local import LocalEngine
from xllm.service.snapshot import FrontObserver


class LocalService:
    """A front with loaded engines. Make it with `start` and end it with `close`."""

    def __init__(self, front: Front, engines: tuple[LocalEngine, ...]) -> None:
        self.front = front
        self.engines = engines
        self._reports: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        configs: Sequence[EngineConfig],
        front_config: FrontConfig,
        clock: Clock,
        *,
        on_progress: OnProgress = ignore_progress,
        observer: FrontObserver | None = None,
        log_level: str = "warning",
    ) -> LocalService:
        """Load one engine per config, one after the other, and put the front before them.

        The calling thread must outlive the service (see `LocalEngine.launch`). Raises what
        launching raises; nothing is left running then.
        """
        service = cls(Front(front_config, None, clock, observer=observer), ())
        try:
            for config in configs:
                await service._add(config, front_config, on_progress, log_level)
        except BaseException:
            await asyncio.shield(service.close())
            raise
        return service

    async def _add(
        self, config: EngineConfig, front_config: FrontConfig, on_progress: OnProgress, log_level: str
    ) -> None:
        timeout_s = front_config.start_timeout_s
        engine = await LocalEngine.launch(
            config, on_progress, self.front.prepare_text, timeout_s=timeout_s, log_level=log_level
        )
        self.engines = (*self.engines, engine)
        await self.front.add_instance(
            engine.stream,
            engine.card,
            name=f"engine-{len(self.engines) - 1}",
            max_reqs=engine.max_reqs,
            on_lost=lambda: self._reports.append(asyncio.create_task(engine.report_exit())),
        )

    async def close(self, drain_s: float = 0.0) -> bool:
        """Let running requests end within `drain_s`, then end everything; True if none was cut off."""
        complete = await self.front.drain(drain_s)
        await self.front.close()
        await asyncio.gather(*(engine.terminate() for engine in self.engines), *self._reports)
        return complete
