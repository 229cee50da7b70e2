"""The front: takes drafts in, places them on instances, hands their output out as streams.

The composition of the service's rooms (catalogue, admission, dispatch, guard, journal). All of
it runs on one event loop. No HTTP, no policy of its own, no engine code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from xllm.clock import Clock
from xllm.config import FrontConfig
from xllm.errors import AbortedError, UnavailableError, XllmError
from xllm.observability.profile import ProcessProfile
from xllm.service.admission import Admission, Ask
from xllm.service.assemble import assemble
from xllm.service.catalogue import Catalogue
from xllm.service.choice_text import choice_text
from xllm.service.dispatch import Dispatch
from xllm.service.draft import RequestDraft
from xllm.service.guard import Guard
from xllm.service.handover.links import Links
from xllm.service.handover.moves import Moves
from xllm.service.handover.relocation import Relocation
from xllm.service.instances.about import InstanceAbout, usable_endpoints
from xllm.service.instances.instance import CauseOf, Instance, InstanceHooks
from xllm.service.journal import RequestJournal
from xllm.service.kvindex import KvIndex
from xllm.service.live import LiveHooks, LiveRequest, StreamLimits
from xllm.service.placer import Choice, Placer, load_views
from xllm.service.roles.board import RoleBoard, Standing
from xllm.service.roles.keeper import RoleKeeper
from xllm.service.router.base import RouterPolicy
from xllm.service.router.registry import load_policy
from xllm.service.snapshot import FrontObserver, FrontSnapshot, InstanceSnapshot, NullObserver
from xllm.service.stream import Delta
from xllm.service.tally import Tally
from xllm.text.assets import TextAssets
from xllm.types import SLO, ModelCard, RequestSpec
from xllm.wire.messages import Moved, Ready, StartProfile
from xllm.wire.stream import EngineStream


class Front:
    """See the module. `router` None = the policy named in the config.

    Invariant: a request has a ticket at dispatch and is counted in admission, or neither; `_ended` is
    the only way out.
    """

    def __init__(
        self,
        config: FrontConfig,
        router: RouterPolicy | None,
        clock: Clock,
        *,
        observer: FrontObserver | None = None,
    ) -> None:
        self._config = config
        # Objectives that nobody asked for would only make prompts wait, unless roles follow them.
        followed = config.role_control == "adaptive"
        self._usual_slo = SLO(ttft_ms=config.slo_ttft_ms, tpot_ms=config.slo_tpot_ms) if followed else SLO()
        self._clock = clock
        self._observer = observer if observer is not None else NullObserver()
        self._catalogue = Catalogue()
        self._admission = Admission(config)
        self._limits = StreamLimits(
            buffer_tokens=config.stream_buffer_tokens, stall_s=config.slow_reader_timeout_s
        )
        self._guard = Guard(config, clock, self._catalogue, self._observer)
        policy = router if router is not None else load_policy(config.router_policy)
        self._board = RoleBoard()
        self._placer = placer = Placer(config, policy, self._board)
        self._links = Links()
        self._moves = Moves(config, clock, self._observer, self._links)
        self._dispatch = Dispatch(
            config,
            clock,
            self._catalogue,
            placer,
            self._admission,
            self._observer,
            self._moves,
            self._links,
            on_draining=self._guard.begin_drain,
        )
        self._relocation = Relocation(
            config, self._catalogue, self._dispatch, placer, self._moves, self._links
        )
        self._guard.connect(self._dispatch, placer, self._relocation)
        self.roles = RoleKeeper(
            config,
            clock,
            self._catalogue,
            placer,
            self._board,
            self._observer,
            is_answered=self._dispatch.is_answered,
        )
        self._tally = Tally()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # -- instances ------------------------------------------------------------------------------

    async def add_instance(
        self,
        stream: EngineStream,
        card: ModelCard | Ready,
        *,
        name: str,
        max_reqs: int | None = None,
        on_lost: Callable[[], None] | None = None,
        about: InstanceAbout | None = None,
        cause_of: CauseOf | None = None,
        on_hung: Callable[[], None] | None = None,
    ) -> Instance:
        """Serve `card`'s model over a stream whose engine has said Ready.

        `max_reqs` is what the instance holds, running and queued. `on_lost` is called once if the
        connection ends unasked, after its requests have been taken off it. `cause_of` is asked why it
        failed (a `failover.blame.DeathCause`). `on_hung` is called when it stays suspect for
        `hang_kill_s`, to kill it; without one the connection is closed then.
        Raises as `Catalogue.add`; the stream is closed then.
        """
        if isinstance(card, Ready):
            max_reqs = card.max_reqs if max_reqs is None else max_reqs
            if about is None:
                about = InstanceAbout(pid=card.pid, phases=card.phases)
            about = replace(about, endpoints=about.endpoints or card.endpoints)
            card = card.card
        if about is not None:
            about = replace(about, endpoints=usable_endpoints(about.endpoints))
        instance = Instance(
            stream, card, name=name, max_reqs=max_reqs, about=about, cause_of=cause_of, on_hung=on_hung
        )

        def lost(instance: Instance) -> None:
            known = instance.started
            self._guard.lost(instance)
            if known and on_lost is not None:
                on_lost()

        guard = self._guard
        instance.start(
            InstanceHooks(
                frame=self._dispatch.deliver,
                lost=lost,
                progress=guard.progress,
                heard=guard.heard,
                pulse=guard.pulse,
                kv=guard.pages,
                moved=self._moved,
            )
        )
        try:
            await self._catalogue.add(instance)
        except BaseException:
            await instance.close()
            raise
        self.roles.joined(instance)
        guard.watch(instance)
        return instance

    async def drain_instance(self, name: str, grace_s: float) -> None:
        """Give it nothing new; what has not ended after `grace_s` goes elsewhere. Returns when it is empty.

        Its connection stays until `remove_instance`. Nothing happens if there is none of that name.
        """
        instance = self._catalogue.get(name)
        if instance is not None:
            await self._guard.drain(instance, grace_s)

    async def remove_instance(self, name: str) -> bool:
        """End the connection; requests on it go elsewhere. `on_lost` is not called. False = not there."""
        instance = self._catalogue.get(name)
        if instance is not None:
            await self._guard.release(instance)
        return instance is not None

    def set_role(self, name: str, role: str, epoch: int | None, *, pinned: bool) -> Standing:
        """Give an instance another role by hand; see `RoleKeeper.set_role`."""
        return self.roles.set_role(name, role, epoch, pinned=pinned)

    @property
    def kv_index(self) -> KvIndex:
        """Which instance holds which pages; for views and tests."""
        return self._placer.index

    def models(self) -> list[ModelCard]:
        """One card per model."""
        return self._catalogue.cards()

    def text(self, model: str) -> TextAssets:
        """Tokenizer and template of a model. Raises NotFoundError."""
        return self._catalogue.text(model)

    def prepare_text(self, assets: dict[str, bytes]) -> None:
        """Begin to make a tokenizer that an instance still to be added will need."""
        self._catalogue.prepare(assets)

    # -- requests -------------------------------------------------------------------------------

    async def submit(self, draft: RequestDraft) -> LiveRequest:
        """Check, admit, place and send the request.

        Raises NotFoundError, RequestError, CapacityError or UnavailableError; nothing is held then.
        """
        try:
            live = self._submit(draft)
        except XllmError as error:
            self._tally.num_refused += 1
            self._observer.on_refused(draft, error.code)
            raise
        self._tally.num_accepted += 1
        return live

    def check(self, draft: RequestDraft) -> None:
        """Whether the draft could be submitted if there were room; raises as `submit` and holds nothing."""
        card = self._catalogue.serving(draft.model)[0].card
        assemble(draft, card, self._catalogue.text(draft.model), self._usual_slo)

    def _submit(self, draft: RequestDraft) -> LiveRequest:
        if self._draining:
            raise UnavailableError("the server is shutting down", code="draining")
        candidates = self._catalogue.serving(draft.model)
        text = self._catalogue.text(draft.model)
        spec = assemble(draft, candidates[0].card, text, self._usual_slo)
        ask, loads, now_s = Ask.of(spec), load_views(candidates), self._clock.monotonic_s()
        self._admission.admit(ask, loads, now_s)
        try:
            choice = self._dispatch.choose(spec, candidates)
            if choice is None:
                raise self._admission.refused("instances", ask, loads, now_s)
            return self._begin(draft, spec, choice, text)
        except BaseException:
            self._dispatch.decline(spec.request_id)
            self._admission.ended(spec.request_id, (), complete=False)
            raise

    def _begin(self, draft: RequestDraft, spec: RequestSpec, choice: Choice, text: TextAssets) -> LiveRequest:
        journal = RequestJournal(
            spec,
            head_width=choice.instance.card.head_width,
            make_text=lambda: choice_text(text, spec.params),
        )
        deadline_s = None if spec.deadline_ms is None else self._clock.monotonic_s() + spec.deadline_ms / 1000
        live = LiveRequest(
            journal,
            clock=self._clock,
            limits=self._limits,
            hooks=LiveHooks(commit=self._commit, delivered=self._on_delta, ended=self._ended),
            deadline_s=deadline_s,
        )
        self._idle.clear()
        self.roles.arrived(spec, choice)
        self._observer.on_accepted(draft, spec)
        self._dispatch.begin(live, choice)
        return live

    async def abort(self, request_id: str) -> bool:
        """End the request with AbortedError; False when there is none of that id (it may have ended)."""
        ticket = self._dispatch.tickets.get(request_id)
        if ticket is not None:
            ticket.live.fail(AbortedError("the request was aborted"))
        return ticket is not None

    def move(self, request_id: str, target: str) -> str:
        """Let a running request go on at the instance of that name. "" = it is under way; else why not."""
        return self._dispatch.move(request_id, target)

    # -- what instances and streams tell -----------------------------------------------------------

    def _moved(self, instance: Instance, message: Moved) -> None:
        self._dispatch.moved(instance, message)
        if instance.draining:
            self._relocation.off(instance)

    def _commit(self, request_id: str, choice: int, count: int) -> None:
        instance = self._dispatch.tickets[request_id].instance
        if instance is not None:
            instance.commit(request_id, choice, count)

    def _on_delta(self, live: LiveRequest, delta: Delta) -> None:
        ticket = self._dispatch.tickets[live.request_id]
        now_s = self._clock.monotonic_s()
        gap_s, first = now_s - ticket.last_s, ticket.first_s is None
        ticket.last_s = now_s
        if first:
            ticket.first_s = now_s
            if ticket.instance is not None:
                self._admission.answered(live.request_id, ticket.instance.snapshot, now_s)
            self._observer.on_first(live.request_id, live.journal.queue_ms / 1000)
        if ticket.instance is not None:
            num_tokens = max(1, len(delta.token_ids))
            # Choices speak in turn, so that the gap of one is that of all of them together.
            gap_ms = gap_s * 1000 * (1 if first else len(live.journal.choices) / num_tokens)
            # The gap before a new attempt's first output is the move's, and not this instance's pace.
            pace_ms = gap_ms if first or ticket.answered else None
            self.roles.spoke(ticket.instance, live.request_id, pace_ms, first=first)
        self._observer.on_delta(live.request_id, ticket.model_id, delta, gap_s, first=first)
        self._dispatch.on_delta(ticket, delta, now_s)

    def _ended(self, live: LiveRequest, abort: bool) -> None:
        ticket = self._dispatch.end(live, abort=abort)
        lens = [len(c.tokens) for c in live.journal.choices]
        self._admission.ended(live.request_id, lens, complete=live.error is None)
        record = self._tally.ended(ticket, self._clock.monotonic_s())
        if not self._dispatch.tickets:
            self._idle.set()
        self._observer.on_ended(record)

    # -- state ------------------------------------------------------------------------------------

    def snapshot(self) -> FrontSnapshot:
        dispatch, guard, tally = self._dispatch, self._guard, self._tally
        return FrontSnapshot(
            num_inflight_reqs=self._admission.num_reqs,
            num_inflight_tokens=self._admission.num_tokens,
            draining=self._draining,
            num_accepted=tally.num_accepted,
            num_refused=tally.num_refused,
            num_ended=dict(tally.num_ended),
            num_divergences=tally.num_divergences,
            num_stale_frames=tally.num_stale_frames + dispatch.num_stale_frames,
            num_waiting=dispatch.num_waiting,
            num_moves=dict(dispatch.num_moves),
            num_deaths=dict(guard.num_deaths),
            num_suspicions=guard.num_suspicions,
            num_quarantined=dispatch.num_quarantined,
            num_nonexact_resumes=dispatch.num_nonexact,
            num_kv_gaps=guard.num_kv_gaps,
            num_moving=len(self._moves),
            num_handovers=dict(self._moves.num_by_outcome),
            num_transfer_failures=dict(self._moves.num_failures),
            num_prefix_fetches=dispatch.num_prefix_fetches,
            instances=tuple(self._instance_snapshot(i) for i in self._catalogue.instances()),
            num_role_switches=dict(self._board.num_switches),
        )

    def _instance_snapshot(self, instance: Instance) -> InstanceSnapshot:
        return InstanceSnapshot(
            name=instance.name,
            model_id=instance.card.model_id,
            alive=instance.alive,
            num_requests=len(instance.requests),
            engine=instance.snapshot,
            state=instance.state,
            about=instance.about,
            backlog_tokens=instance.backlog_tokens,
            context_tokens=instance.context_tokens,
            quiet_s=self._guard.quiet_s(instance),
            num_indexed_pages=self._placer.index.num_pages(instance.name),
            num_inbound=len(instance.inbound),
            standing=self._board.standing(instance.name),
        )

    def start_profiles(self, max_events: int, max_s: float) -> None:
        """Every engine records what it does, from its next step on."""
        for instance in self._catalogue.instances():
            instance.post(StartProfile(max_events=max_events, max_s=max_s))

    async def stop_profiles(self, timeout_s: float) -> dict[str, ProcessProfile | None]:
        """By instance; None = it gave no answer in time."""
        instances = [i for i in self._catalogue.instances() if i.alive]
        found = await asyncio.gather(*(i.profile(timeout_s) for i in instances))
        return {i.name: profile for i, profile in zip(instances, found, strict=True)}

    def ready(self) -> tuple[bool, str]:
        """Whether every known model can be served, in all phases; why not: a word for a health response."""
        instances = self._catalogue.instances()
        if self._draining:
            return False, "draining"
        if not instances:
            return False, "loading"
        served = {i.card.model_id for i in instances if i.routable}
        idle = [i.state for i in instances if i.card.model_id not in served]
        if not idle:
            lacking = self.roles.lacking()
            return (False, f"no_{lacking}") if lacking else (True, "ready")
        words = ("lost", "suspect", "draining")
        return False, next((f"engine_{state}" for state in words if state in idle), "loading")

    def check_times(self) -> None:
        """Apply all time limits now. Requests and guard have timers; tests with a fake clock have this."""
        for ticket in tuple(self._dispatch.tickets.values()):
            ticket.live.check_time()
        self._guard.tick()
        self.roles.check_time()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing new and wait for what runs; after `timeout_s` the rest ends with an error.

        None takes the time from the config. True when nothing had to be cut off.
        """
        self._draining = True
        limit_s = self._config.shutdown_timeout_s if timeout_s is None else timeout_s
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            self._fail_all()
            return False
        return True

    async def close(self) -> None:
        """End every request and connection. Engines are ended by who started them."""
        self._draining = True
        self._fail_all()
        for instance in self._catalogue.instances():
            await instance.close()
        await self._guard.close()
        self.roles.close()
        await self._catalogue.close()

    def _fail_all(self) -> None:
        for ticket in tuple(self._dispatch.tickets.values()):
            ticket.live.fail(UnavailableError("the server is shutting down", code="draining"))
