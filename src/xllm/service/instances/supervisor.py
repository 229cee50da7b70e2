"""Keeps the engine processes of this machine alive: starts, proves, restarts and replaces them.

One slot per engine, one task per slot; an engine's name outlives its incarnations. When to start again
is decided in `restart`, what becomes of requests by the front. Everything runs on the loop's thread,
which must outlive the engines: the kernel ends a child with the thread that made it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from xllm.clock import Clock
from xllm.config import EngineConfig, FrontConfig
from xllm.config.instances import phases_in_order
from xllm.errors import XllmError
from xllm.service.failover.blame import DeathCause
from xllm.service.instances.about import InstanceAbout
from xllm.service.instances.canary import Canaries, ask
from xllm.service.instances.instance import CauseOf
from xllm.service.instances.local import LocalEngine
from xllm.service.instances.pages import SlotPages
from xllm.service.instances.restart import Restarts, cause_of_death
from xllm.types import MIXED, ModelCard, Phase
from xllm.wire.stream import EngineStream

log = logging.getLogger(__name__)

OnEngineProgress = Callable[[str, str, float], None]
"""(engine's name, stage that has just ended, seconds it took)."""

OnUp = Callable[[str, LocalEngine], None]
"""An engine takes requests from now on."""

ROLLING_GRACE_S = 5.0
"""Requests may end by themselves for so long before they are moved: moving is exact and costs a prefill."""

Launch = Callable[..., Awaitable[LocalEngine]]
Sleep = Callable[[float], Awaitable[None]]


class Served(Protocol):
    """What the supervisor needs of an instance of the front."""

    @property
    def ended_receiving(self) -> bool: ...


class EngineKeeper(Protocol):
    """What the supervisor needs of the front."""

    def prepare_text(self, assets: dict[str, bytes]) -> None: ...

    async def add_instance(
        self,
        stream: EngineStream,
        card: ModelCard,
        *,
        name: str,
        max_reqs: int | None,
        on_lost: Callable[[], None] | None,
        about: InstanceAbout | None,
        cause_of: CauseOf | None,
        on_hung: Callable[[], None] | None,
    ) -> Served: ...

    async def drain_instance(self, name: str, grace_s: float) -> object: ...

    async def remove_instance(self, name: str) -> object: ...


class Slot:
    """One engine's place: what stays when the process goes. Written by the supervisor only."""

    def __init__(self, name: str, config: EngineConfig, role: frozenset[Phase] = MIXED) -> None:
        self.name = name
        self.config = config
        self.role = role
        self.restarts = Restarts()
        self.pages = SlotPages(name)
        self.engine: LocalEngine | None = None
        self.instance: Served | None = None
        self.num_starts = 0
        self.task: asyncio.Task[None] | None = None
        self.planned = False
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.tried = asyncio.Event()


class Supervisor:
    """`start`, then it works by itself until `close`."""

    def __init__(
        self,
        front: EngineKeeper,
        configs: Sequence[EngineConfig],
        front_config: FrontConfig,
        clock: Clock,
        *,
        on_progress: OnEngineProgress = lambda name, stage, elapsed_s: None,
        on_up: OnUp = lambda name, engine: None,
        log_level: str = "warning",
        launch: Launch = LocalEngine.launch,
        sleep: Sleep = asyncio.sleep,
        roles: Sequence[frozenset[Phase]] = (),
    ) -> None:
        """`roles` of the engines at first, one per config; none = all are mixed."""
        self._front = front
        self._config = front_config
        self._clock = clock
        self._on_progress = on_progress
        self._on_up = on_up
        self._log_level = log_level
        self._launch = launch
        self._sleep = sleep
        self._canaries = Canaries()
        self._starting: asyncio.Task[None] | None = None
        self._rolling = asyncio.Lock()
        named = zip(configs, roles or [MIXED] * len(configs), strict=True)
        self.slots = tuple(Slot(f"engine-{i}", config, role) for i, (config, role) in enumerate(named))

    async def start(self) -> None:
        """Start the first engine, and the others one after another behind it.

        Returns once the first one takes requests: it alone has the machine to load, and packs the weights
        that the others then map. Raises what starting it raises; nothing is left running then.
        """
        first, *others = self.slots
        await self._bring_up(first)
        self._look_after(first)
        if others:
            self._starting = asyncio.create_task(self._start_others(others), name="start engines")

    async def all_tried(self) -> None:
        """Wait until every engine has been started once, or failed to."""
        for slot in self.slots:
            await slot.tried.wait()

    async def rolling_restart(self) -> None:
        """Replace every engine, one by one, each only when the one before it takes requests again."""
        if self._rolling.locked():
            log.warning("a rolling restart is under way; this one is left out")
            return
        async with self._rolling:
            for slot in self.slots:
                if slot.up.is_set():
                    await self._replace(slot)

    async def close(self) -> None:
        """End every engine; nothing is started any more. The front has let go of them."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(_end(slot) for slot in self.slots))

    # -- one slot -----------------------------------------------------------------------------------

    async def _start_others(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._look_after(slot)
            await slot.tried.wait()

    def _look_after(self, slot: Slot) -> None:
        slot.task = asyncio.create_task(self._keep(slot), name=f"keep {slot.name}")

    async def _keep(self, slot: Slot) -> None:
        """Have an engine in the slot for ever."""
        while True:
            if not slot.up.is_set() and not await self._try(slot):
                await self._sleep(slot.restarts.died(self._clock.monotonic_s()))
                continue
            await slot.down.wait()
            slot.up.clear()
            engine, planned, slot.planned = slot.engine, slot.planned, False
            cause: DeathCause = "unknown"
            if engine is not None:
                code = await engine.terminate()
                cause = cause_of_death(code, stopped=False, silent=engine.silent)
                if not planned:
                    log.error(
                        "%s (process %d) ended with code %d; starting it again", slot.name, engine.pid, code
                    )
            _part_with_pages(slot)
            if not planned:
                await self._sleep(slot.restarts.died(self._clock.monotonic_s(), cause))

    async def _try(self, slot: Slot) -> bool:
        try:
            await self._bring_up(slot)
        except XllmError as error:
            log.error("%s could not be started: %s", slot.name, error)
        except Exception:
            # A bug of ours must not end the slot for ever.
            log.exception("%s could not be started", slot.name)
        finally:
            slot.tried.set()
        return slot.up.is_set()

    async def _bring_up(self, slot: Slot) -> None:
        """Start, prove and add an engine; `slot.up` is set afterwards. Nothing is left if it raises."""
        engine = await self._launched(slot, slot.pages)
        try:
            await self._add(slot, engine)
        except BaseException:
            await asyncio.shield(engine.terminate())
            raise

    async def _launched(self, slot: Slot, pages: SlotPages) -> LocalEngine:
        """An engine that has loaded and answered as one of its class must."""
        slot.num_starts += 1
        engine = await self._launch(
            slot.config,
            lambda stage, elapsed_s: self._on_progress(slot.name, stage, elapsed_s),
            self._front.prepare_text,
            timeout_s=self._config.start_timeout_s,
            log_level=self._log_level,
            pages_fd=pages.fd,
        )
        try:
            answer, engine.stream = await ask(engine.stream, engine.card, self._config.start_timeout_s)
            self._canaries.check(engine.card, answer)
        except BaseException:
            # What this engine left in the pages is no more to be believed than the engine.
            pages.renew()
            await asyncio.shield(engine.terminate())
            raise
        return engine

    async def _add(self, slot: Slot, engine: LocalEngine) -> None:
        slot.down.clear()
        slot.engine = engine
        slot.instance = await self._front.add_instance(
            engine.stream,
            engine.card,
            name=slot.name,
            max_reqs=engine.max_reqs,
            on_lost=slot.down.set,
            about=InstanceAbout(
                pid=engine.pid,
                incarnation=engine.incarnation,
                phases=phases_in_order(slot.role),
                num_restarts=slot.num_starts - 1,
                pulses=engine.pulses,
                endpoints=engine.endpoints,
            ),
            cause_of=engine.cause,
            on_hung=engine.kill,
        )
        slot.restarts.serving(self._clock.monotonic_s())
        slot.up.set()
        slot.tried.set()
        self._on_up(slot.name, engine)

    async def _replace(self, slot: Slot) -> None:
        if any(other.up.is_set() for other in self.slots if other is not slot):
            await self._restart_in_place(slot, min(ROLLING_GRACE_S, self._config.shutdown_timeout_s))
        else:
            await self._succeed(slot)

    async def _restart_in_place(self, slot: Slot, grace_s: float) -> None:
        """The others take over meanwhile. Takes no second helping of memory, and the pages stay."""
        log.info("%s is restarted in place", slot.name)
        await self._front.drain_instance(slot.name, grace_s)
        if not slot.up.is_set():
            return  # it died of itself meanwhile and is being started anew
        slot.planned = True
        slot.up.clear()
        await self._front.remove_instance(slot.name)
        slot.down.set()
        await slot.up.wait()

    async def _succeed(self, slot: Slot) -> None:
        """Nobody else could take over, so a successor in a slot of its own takes requests before it goes.

        Costs memory for two until then, and the pages. An engine that finds no room says so itself; then
        the old one is restarted in place, running requests wait, and new ones are told to come again.
        """
        names = {f"engine-{i}" for i in range(len(self.slots) + 1)} - {s.name for s in self.slots}
        fresh = Slot(min(names), slot.config, slot.role)
        try:
            await self._bring_up(fresh)
        except XllmError as error:
            log.warning("no second engine can be started beside %s (%s)", slot.name, error)
            fresh.pages.close()
            await self._restart_in_place(slot, 0.0)
            return
        self._look_after(fresh)
        self.slots = (*self.slots, fresh)
        await self._front.drain_instance(slot.name, min(ROLLING_GRACE_S, self._config.shutdown_timeout_s))
        await self._front.remove_instance(slot.name)
        await _end(slot)
        self.slots = tuple(s for s in self.slots if s is not slot)


def _part_with_pages(slot: Slot) -> None:
    """A peer that was bringing pages may have them mapped, and a stopped one may write when it goes on: into
    what belongs to somebody else by then, if the next engine used the same memory."""
    if slot.instance is not None and slot.instance.ended_receiving:
        log.warning("%s ended while pages were brought to it; it begins with fresh memory", slot.name)
        slot.pages.renew()


async def _end(slot: Slot) -> None:
    """For good: nothing is started in it any more."""
    if slot.task is not None:
        slot.task.cancel()
        await asyncio.gather(slot.task, return_exceptions=True)
    if slot.engine is not None:
        await slot.engine.terminate()
    slot.pages.close()
