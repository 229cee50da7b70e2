"""EngineCore: one engine step is plan → execute → absorb, on one screen; the next is planned meanwhile.

Charter: policy lives in `scheduler` and `memory`, maths behind `executor`, transport in `hub`.
Only what every step of every model needs may live here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from xllm.clock import Clock
from xllm.engine.executor.base import Executor
from xllm.engine.kernels.programs import ProgramCounters
from xllm.engine.kvtransfer.base import TransferEvent, Transfers
from xllm.engine.kvtransfer.nowhere import NoTransfers
from xllm.engine.memory.manager import PageManager
from xllm.engine.memory.news import PageChanges
from xllm.engine.moving import Mover
from xllm.engine.plan import StepPlan, StepResult
from xllm.engine.profiling import EngineProfile
from xllm.engine.progress import StepProgress
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.engine.steps import Steps
from xllm.engine.surviving import Keeper
from xllm.errors import UnavailableError
from xllm.limits import validate_spec
from xllm.types import PAGE_SIZE, EngineSnapshot, ModelCard, RequestSpec
from xllm.wire.messages import Frame

Outputs = dict[int, list[Frame]]
"""Frames in the order they came due, by the owner of the request."""


class EngineCore:
    """Owned by exactly one thread: the step thread. `progress` may be read by any.

    Between two turns at most one step is under way. Whatever concerns transfers first waits for it
    (`quiesce`), and while a request is being moved away none is planned behind another.
    """

    def __init__(
        self,
        card: ModelCard,
        scheduler: Scheduler,
        memory: PageManager,
        executor: Executor,
        clock: Clock,
        program_counters: Callable[[], ProgramCounters | None] = lambda: None,
        progress: StepProgress | None = None,
        profile: EngineProfile | None = None,
    ) -> None:
        self.card = card
        self.scheduler = scheduler
        self.clock = clock
        self.progress = progress or StepProgress()
        self.profile = profile or EngineProfile(clock)
        self._memory = memory
        self.steps = Steps(executor, clock)
        self._program_counters = program_counters
        self.keeper: Keeper | None = None
        self._events: deque[TransferEvent] = deque()
        self.mover = self._mover(NoTransfers(self._events.append))
        self._draining = False

    def join(self, transfers: Transfers) -> None:
        """Exchange pages with peers from now on; before the first request. Its events go to `on_event`."""
        self.mover = self._mover(transfers)

    def on_event(self, event: TransferEvent) -> None:
        """The transfers have something to tell. Not from within a call to them."""
        self.mover.on_event(event, self.clock.monotonic_s())

    def submit(
        self, spec: RequestSpec, owner: int = 0, transfer_id: str = "", sources: tuple[str, ...] = ()
    ) -> None:
        """Accept a request or raise an XllmError; checked again here, since a front is only a peer."""
        if self._draining:
            raise UnavailableError("this engine is draining", code="draining", retry_after_s=1.0)
        validate_spec(spec, self.card)
        now_s = self.clock.monotonic_s()
        self.scheduler.submit(spec, now_s, owner)
        if transfer_id:
            self.mover.submitted(spec.request_id, owner, transfer_id, sources, now_s)

    def abort(self, request_id: str, owner: int = 0) -> None:
        self.scheduler.abort(request_id, owner)

    def advance(self) -> bool:
        """Run one step if anything can run; whether it did. What came due waits in `take_outputs`."""
        self.begin_turn()
        self.plan()
        self.plan()
        return self.collect()

    def begin_turn(self) -> None:
        now_s = self.clock.monotonic_s()
        self.progress.begin(now_s)
        while self._events:
            self.mover.on_event(self._events.popleft(), now_s)
        self.mover.tick(now_s)
        self.progress.predicted_ms = self.steps.predicted_ms

    @property
    def may_plan_ahead(self) -> bool:
        """A step is under way, and another one may be handed over."""
        return bool(self.steps) and self.steps.has_room and not self.mover.needs_quiet

    def plan(self) -> bool:
        """Plan a step and hand it over, behind the one under way if there is one; False = there is none."""
        if self.steps and not self.may_plan_ahead:
            return False
        began_s = self.clock.monotonic_s()
        plan = self.scheduler.plan(began_s, self.steps.pace.cost)
        if self.profile.on:
            self.profile.planned(plan, began_s)
        is_idle = plan is None and not self.steps
        if self.keeper is not None and self.keeper.num_due:
            # Now, since what the last step brought is on its way to its readers. In proportion to the step.
            num_rows = 0 if plan is None else plan.num_rows
            self.keeper.write(None if is_idle else 1 + num_rows // PAGE_SIZE)
        if is_idle:
            self.steps.rest()
        if plan is None:
            return False
        self.mover.before_step(plan)
        self.steps.submit(plan)
        self.progress.predicted_ms = self.steps.predicted_ms
        return True

    def collect(self) -> bool:
        """Wait for the oldest step and absorb it; False = none is under way."""
        ran = bool(self.steps)
        if ran:
            self.end_step(*self.steps.collect())
        if not self.scheduler.has_requests and not self.steps:
            # With no request alive no page may be owned.
            self._memory.check_idle()
        return ran

    def end_step(self, plan: StepPlan, result: StepResult) -> None:
        profiled, began_s = self.profile.on, self.clock.monotonic_s()
        if profiled:
            self.profile.ran(plan, result)
        self.scheduler.absorb(plan, result)
        if profiled:
            self.profile.absorbed(plan, began_s)
        if not result.dropped:
            self.mover.after_step(result.rerun)
        if result.rerun:
            # What was handed over behind it is dropped. At once, or the next plan would build upon it.
            self.quiesce()

    def quiesce(self) -> None:
        """Until no step is under way."""
        while self.steps:
            self.end_step(*self.steps.collect())

    def take_outputs(self) -> Outputs:
        """Frames since the last call, terminal ones included."""
        return self.scheduler.take_outputs()

    def step(self) -> tuple[bool, tuple[Frame, ...]]:
        """`advance`, and all that came due whoever owns it; for callers with one front."""
        return self.advance(), self.scheduler.take_frames()

    @property
    def has_requests(self) -> bool:
        return self.scheduler.has_requests

    @property
    def has_prefix_cache(self) -> bool:
        return self._memory.news is not None

    @property
    def has_page_news(self) -> bool:
        return bool(self._memory.news)

    def take_page_changes(self) -> PageChanges:
        """Names of cached pages that came and went since the last call."""
        news = self._memory.news
        return PageChanges() if news is None else news.take()

    def page_names(self) -> tuple[bytes, ...]:
        """Names of all cached pages."""
        return self._memory.names()

    def drain(self) -> None:
        """Accept nothing new; what runs goes on."""
        self._draining = True
        self.mover.drain()

    def abort_all(self, owner: int | None = None) -> int:
        """End every request, or every one of an owner, with one terminal event each; how many."""
        return self.scheduler.abort_all(owner)

    def snapshot(self, **more: int) -> EngineSnapshot:
        """`more` are fields that others count."""
        programs = self._program_counters()
        moves = self.mover.counters
        pace = self.steps.pace
        counted = (
            {}
            if programs is None
            else {
                "program_captures": programs.captures,
                "program_replays": programs.replays,
                "num_eager_steps": programs.eager,
                "program_arena_bytes": programs.arena_bytes,
            }
        )
        return msgspec.structs.replace(
            self.scheduler.snapshot(),
            last_step_ms=self.steps.last_ms,
            num_step_gaps=self.steps.num_gaps,
            step_gaps_ms=self.steps.gaps_ms,
            cost=pace.coefficients,
            cost_error=pace.error,
            half_cost=pace.half,
            draining=self._draining,
            num_moved_out=moves.num_out,
            num_moved_in=moves.num_in,
            num_failed_moves=moves.num_failed,
            sent_bytes=moves.sent_bytes,
            received_bytes=moves.received_bytes,
            **self._memory.map_counts(),
            **counted,
            **more,
        )

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.write()
        self.steps.close()

    def _mover(self, transfers: Transfers) -> Mover:
        return Mover(self.scheduler, self._memory, transfers, settle=self._settle, quiesce=self.quiesce)

    def _settle(self) -> None:
        """Carry out the page copies that are due."""
        self.quiesce()
        plan = self.scheduler.take_copies()
        if plan is not None:
            self.steps.execute(plan)
