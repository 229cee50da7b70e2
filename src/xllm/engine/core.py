"""EngineCore: one engine step is plan → execute → absorb, on one screen.

Charter: policy lives in `scheduler` and `memory`, maths behind `executor`, transport in `process`.
Only what every step of every model needs may live here.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from xllm.clock import Clock
from xllm.engine.executor.base import Executor
from xllm.engine.kernels.programs import ProgramCounters
from xllm.engine.memory.manager import PageManager
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.engine.surviving import Keeper
from xllm.errors import UnavailableError
from xllm.limits import validate_spec
from xllm.types import PAGE_SIZE, EngineSnapshot, ModelCard, RequestSpec
from xllm.wire.messages import Frame


class EngineCore:
    """Owned by exactly one thread: the step thread."""

    def __init__(
        self,
        card: ModelCard,
        scheduler: Scheduler,
        memory: PageManager,
        executor: Executor,
        clock: Clock,
        program_counters: Callable[[], ProgramCounters | None] = lambda: None,
    ) -> None:
        self.card = card
        self.scheduler = scheduler
        self._memory = memory
        self._executor = executor
        self._clock = clock
        self._program_counters = program_counters
        self.keeper: Keeper | None = None
        self._last_step_ms = 0.0
        self._draining = False

    def submit(self, spec: RequestSpec) -> None:
        """Accept a request or raise an XllmError; checked again here, since a front is only a peer."""
        if self._draining:
            raise UnavailableError("this engine is draining", code="draining", retry_after_s=1.0)
        validate_spec(spec, self.card)
        self.scheduler.submit(spec, self._clock.monotonic_s())

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def step(self) -> tuple[bool, tuple[Frame, ...]]:
        """Run one step if anything can run: (did it, the frames that came due, terminal ones included)."""
        plan = self.scheduler.plan(self._clock.monotonic_s())
        if self.keeper is not None and self.keeper.num_due:
            # Now, since what the last step brought is on its way to its readers. In proportion to the step.
            self.keeper.write(None if plan is None else 1 + plan.num_rows // PAGE_SIZE)
        if plan is not None:
            result = self._executor.execute(plan)
            self._last_step_ms = result.elapsed_ms
            self.scheduler.absorb(plan, result)
        if not self.scheduler.has_requests:
            self._memory.check_idle()
        return plan is not None, self.scheduler.take_frames()

    @property
    def has_requests(self) -> bool:
        return self.scheduler.has_requests

    def drain(self) -> None:
        """Accept nothing new; what runs goes on."""
        self._draining = True

    def abort_all(self) -> None:
        """End every request, one terminal event each."""
        for request_id in self.scheduler.request_ids():
            self.scheduler.abort(request_id)

    def snapshot(self) -> EngineSnapshot:
        snapshot = msgspec.structs.replace(self.scheduler.snapshot(), last_step_ms=self._last_step_ms)
        programs = self._program_counters()
        if programs is None:
            return snapshot
        return msgspec.structs.replace(
            snapshot,
            program_captures=programs.captures,
            program_replays=programs.replays,
            num_eager_steps=programs.eager,
            program_arena_bytes=programs.arena_bytes,
        )

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.write()
        self._executor.close()
