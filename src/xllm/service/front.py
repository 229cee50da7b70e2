"""The front: takes drafts in, places them on instances, hands their output out as streams.

The composition of the service's rooms (catalogue, admission, router, journal, instances). All of
it runs on one event loop. No HTTP, no policy of its own, no engine code.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from xllm.clock import Clock
from xllm.config import FrontConfig
from xllm.errors import AbortedError, CapacityError, InternalError, UnavailableError, XllmError
from xllm.service.admission import RETRY_AFTER_S, Admission
from xllm.service.assemble import assemble
from xllm.service.catalogue import Catalogue
from xllm.service.choice_text import choice_text
from xllm.service.draft import RequestDraft
from xllm.service.instances.instance import Instance
from xllm.service.journal import RequestJournal
from xllm.service.live import LiveHooks, LiveRequest, StreamLimits
from xllm.service.router.base import InstanceView, Placement, RequestView, RouterPolicy, RouterSnapshot
from xllm.service.router.registry import load_policy
from xllm.service.snapshot import FrontObserver, FrontSnapshot, InstanceSnapshot, NullObserver
from xllm.service.stream import Delta
from xllm.service.tally import Tally
from xllm.text.assets import TextAssets
from xllm.types import ModelCard, RequestSpec
from xllm.wire.messages import Abort, Frame, Submit
from xllm.wire.stream import EngineStream

log = logging.getLogger(__name__)


class _Placed:
    """What the front keeps per live request."""

    __slots__ = ("first_s", "instance", "last_s", "live")

    def __init__(self, live: LiveRequest, instance: Instance) -> None:
        self.live = live
        self.instance = instance
        self.first_s: float | None = None
        self.last_s = live.submitted_s


class Front:
    """See the module. `router` None = the policy named in the config.

    Invariant: a request is in `_live`, counted in admission and listed at its instance, or in
    none of the three; `_ended` is the only way out.
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
        self._router = router if router is not None else load_policy(config.router_policy)
        self._clock = clock
        self._observer = observer if observer is not None else NullObserver()
        self._catalogue = Catalogue()
        self._admission = Admission(
            max_reqs=config.max_num_inflight_reqs, max_tokens=config.max_num_inflight_tokens
        )
        self._limits = StreamLimits(
            buffer_tokens=config.stream_buffer_tokens, stall_s=config.slow_reader_timeout_s
        )
        self._live: dict[str, _Placed] = {}
        self._turns: Counter[str] = Counter()
        self._tally = Tally()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # -- instances ------------------------------------------------------------------------------

    async def add_instance(
        self,
        stream: EngineStream,
        card: ModelCard,
        *,
        name: str,
        max_reqs: int | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> Instance:
        """Serve `card`'s model over a stream whose engine has said Ready.

        `max_reqs` is what the instance holds, running and queued. `on_lost` is called once if the
        connection ends unasked, after its requests have ended. Raises as `Catalogue.add`; the
        stream is closed then.
        """
        instance = Instance(stream, card, name=name, max_reqs=max_reqs)

        def lost(instance: Instance) -> None:
            self._on_lost(instance)
            if on_lost is not None:
                on_lost()

        instance.start(on_frame=self._on_frame, on_lost=lost)
        try:
            await self._catalogue.add(instance)
        except BaseException:
            await instance.close()
            raise
        return instance

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

    def _submit(self, draft: RequestDraft) -> LiveRequest:
        if self._draining:
            raise UnavailableError("the server is shutting down", code="draining")
        candidates = self._catalogue.serving(draft.model)
        text = self._catalogue.text(draft.model)
        spec = assemble(draft, candidates[0].card, text)
        instance, placement = self._place(spec, candidates)
        journal = RequestJournal(
            spec,
            head_width=instance.card.head_width,
            make_text=lambda: choice_text(text, spec.params),
        )
        self._admission.admit(journal.num_prompt_tokens)
        deadline_s = None if spec.deadline_ms is None else self._clock.monotonic_s() + spec.deadline_ms / 1000
        live = LiveRequest(
            journal,
            clock=self._clock,
            limits=self._limits,
            hooks=LiveHooks(commit=instance.commit, delivered=self._on_delta, ended=self._ended),
            deadline_s=deadline_s,
        )
        self._live[live.request_id] = _Placed(live, instance)
        instance.requests.add(live.request_id)
        self._idle.clear()
        self._observer.on_accepted(draft, spec)
        self._observer.on_placed(live.request_id, placement, spec.attempt)
        instance.post(Submit(spec=spec))
        return live

    async def abort(self, request_id: str) -> bool:
        """End the request with AbortedError; False when there is none of that id (it may have ended)."""
        placed = self._live.get(request_id)
        if placed is not None:
            placed.live.fail(AbortedError("the request was aborted"))
        return placed is not None

    def _place(self, spec: RequestSpec, candidates: tuple[Instance, ...]) -> tuple[Instance, Placement]:
        view = RequestView(
            request_id=spec.request_id,
            model=spec.model,
            num_prompt_tokens=len(spec.prompt_token_ids),
            num_choices=spec.params.n,
            cls=spec.cls,
            priority=spec.priority,
            slo=spec.slo,
            attempt=spec.attempt,
        )
        views = tuple(
            InstanceView(name=i.name, num_reqs=len(i.requests), max_reqs=i.max_reqs, engine=i.snapshot)
            for i in candidates
        )
        snapshot = RouterSnapshot(instances=views, turn=self._turns[spec.model])
        placement = self._router(view, snapshot, self._config)
        if placement is None:
            message = "all instances of this model are full; try again later"
            raise CapacityError(message, retry_after_s=RETRY_AFTER_S)
        self._turns[spec.model] += 1
        chosen = next((i for i in candidates if i.name == placement.instance), None)
        if chosen is None:
            raise InternalError("the router policy chose an instance that it was not offered")
        return chosen, placement

    # -- what instances and streams tell -----------------------------------------------------------

    def _on_frame(self, instance: Instance, frame: Frame) -> None:
        placed = self._live.get(frame.request_id)
        # Unknown: the request ended here (stop string, abort) before the engine heard of it. Another
        # instance's: not its business any more, or never was.
        if placed is not None and placed.instance is instance:
            placed.live.deliver(frame)

    def _on_lost(self, instance: Instance) -> None:
        # Failover will take the journals to another instance here; until it does, requests end.
        log.error("instance %s is lost with %d requests", instance.name, len(instance.requests))
        for request_id in tuple(instance.requests):
            error = UnavailableError("the engine that worked on this request was lost", code="engine_lost")
            self._live[request_id].live.fail(error, abort=False)

    def _on_delta(self, live: LiveRequest, delta: Delta) -> None:
        placed = self._live[live.request_id]
        now_s = self._clock.monotonic_s()
        gap_s, first = now_s - placed.last_s, placed.first_s is None
        placed.last_s = now_s
        if first:
            placed.first_s = now_s
            self._observer.on_first(live.request_id, live.journal.queue_ms / 1000)
        model = placed.instance.card.model_id
        self._observer.on_delta(live.request_id, model, delta, gap_s, first=first)

    def _ended(self, live: LiveRequest, abort: bool) -> None:
        placed = self._live.pop(live.request_id)
        journal = live.journal
        placed.instance.requests.discard(live.request_id)
        placed.instance.forget(live.request_id, len(journal.choices))
        if abort:
            placed.instance.post(Abort(request_id=live.request_id, attempt=journal.attempt))
        self._admission.release(journal.num_prompt_tokens)
        record = self._tally.ended(
            live,
            model=placed.instance.card.model_id,
            instance=placed.instance.name,
            first_s=placed.first_s,
            now_s=self._clock.monotonic_s(),
        )
        if not self._live:
            self._idle.set()
        self._observer.on_ended(record)

    # -- state ------------------------------------------------------------------------------------

    def snapshot(self) -> FrontSnapshot:
        instances = tuple(
            InstanceSnapshot(
                name=i.name,
                model_id=i.card.model_id,
                alive=i.alive,
                num_requests=len(i.requests),
                engine=i.snapshot,
            )
            for i in self._catalogue.instances()
        )
        return FrontSnapshot(
            num_inflight_reqs=self._admission.num_reqs,
            num_inflight_tokens=self._admission.num_tokens,
            draining=self._draining,
            num_accepted=self._tally.num_accepted,
            num_refused=self._tally.num_refused,
            num_ended=dict(self._tally.num_ended),
            num_divergences=self._tally.num_divergences,
            num_stale_frames=self._tally.num_stale_frames,
            instances=instances,
        )

    def ready(self) -> tuple[bool, str]:
        """Whether every model can be served, and why not: a word fit for a health response."""
        instances = self._catalogue.instances()
        if self._draining:
            return False, "draining"
        if not instances:
            return False, "loading"
        alive = {i.card.model_id for i in instances if i.alive}
        if any(i.card.model_id not in alive for i in instances):
            return False, "engine_lost"
        return True, "ready"

    def check_times(self) -> None:
        """Apply deadlines and reader limits now. Requests have timers; tests with a fake clock have this."""
        for placed in tuple(self._live.values()):
            placed.live.check_time()

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
        await self._catalogue.close()

    def _fail_all(self) -> None:
        for placed in tuple(self._live.values()):
            placed.live.fail(UnavailableError("the server is shutting down", code="draining"))
