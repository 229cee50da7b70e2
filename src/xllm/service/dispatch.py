"""Who works on which request: placing, taking back, placing again until it has ended.

The mechanism around the pure decisions of `failover` and `router`; all calls on the front's loop. It
does not watch instances (`guard`) and does not judge output (the journal).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence

from xllm.clock import Clock
from xllm.config import FrontConfig
from xllm.errors import CapacityError, InternalError, RequestError, UnavailableError, XllmError
from xllm.service.admission import Admission
from xllm.service.catalogue import Catalogue, no_instance
from xllm.service.eligible import large_enough, preferred
from xllm.service.failover.blame import Blame, DeathCause
from xllm.service.failover.resume import MAX_REFUSALS, ResumeQueue, retry_delay_s
from xllm.service.handover.links import Links
from xllm.service.handover.moves import Moves, Pending
from xllm.service.handover.pair import why_not
from xllm.service.handover.prefixes import Prefixes
from xllm.service.handover.price import price
from xllm.service.handover.record import Reason
from xllm.service.instances.instance import Instance
from xllm.service.live import LiveRequest
from xllm.service.placer import Choice, Placer
from xllm.service.snapshot import FrontObserver
from xllm.service.stream import Delta
from xllm.service.ticket import Ticket
from xllm.types import FinishReason, RequestSpec
from xllm.wire.messages import Abort, CancelTransfer, Frame, Moved, Submit

log = logging.getLogger(__name__)
decisions = logging.getLogger("xllm.decisions")


class Dispatch:
    """Owns the tickets. Invariant: a ticket is on an instance (and in its `requests`) or in the queue."""

    def __init__(
        self,
        config: FrontConfig,
        clock: Clock,
        catalogue: Catalogue,
        placer: Placer,
        admission: Admission,
        observer: FrontObserver,
        moves: Moves,
        links: Links,
        *,
        on_draining: Callable[[Instance], None],
    ) -> None:
        """`on_draining`: an instance has refused a request because it is about to go."""
        self.tickets: dict[str, Ticket] = {}
        self.num_moves: Counter[str] = Counter()
        self.num_stale_frames = 0
        self.num_quarantined = 0
        self.num_nonexact = 0
        self._config = config
        self._clock = clock
        self._catalogue = catalogue
        self._placer = placer
        self._admission = admission
        self._observer = observer
        self._moves = moves
        self._links = links
        self._prefixes = Prefixes(catalogue, links)
        self._on_draining = on_draining
        self._queue = ResumeQueue(config.max_resumes)
        self._blame = Blame()
        self._next_age = 0
        self._pumping = False

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    @property
    def num_prefix_fetches(self) -> int:
        return self._prefixes.num_fetches

    def is_answered(self, request_id: str) -> bool:
        """Whether its present attempt has said something, or it has ended."""
        ticket = self.tickets.get(request_id)
        return ticket is None or ticket.answered

    # -- a new request --------------------------------------------------------------------------------

    def choose(self, spec: RequestSpec, candidates: Sequence[Instance]) -> Choice | None:
        """Where a new request goes; `begin` or `decline` follows. None when all are full."""
        return self._placer.choose(spec, large_enough(spec, candidates))

    def decline(self, request_id: str) -> None:
        """What was chosen for a new request is not needed: it was not admitted."""
        self._placer.settled(request_id)

    def begin(self, live: LiveRequest, choice: Choice) -> None:
        """Take on a request that was admitted, and send it."""
        ticket = Ticket(live, choice.instance.card.model_id, self._next_age)
        self._next_age += 1
        self.tickets[live.request_id] = ticket
        self._place(ticket, choice, live.journal.spec)

    def end(self, live: LiveRequest, *, abort: bool) -> Ticket:
        """The request has ended; `abort` = its engine may not know."""
        ticket = self.tickets.pop(live.request_id)
        instance, _ = self._leave(ticket, "ended")
        self._drop_offer(ticket)
        if instance is not None and abort:
            instance.post(Abort(request_id=live.request_id, attempt=live.journal.attempt))
        self._queue.drop(live.request_id)
        self._blame.forget(live.request_id)
        self.pump()
        return ticket

    # -- what instances say ---------------------------------------------------------------------------

    def deliver(self, instance: Instance, frame: Frame) -> None:
        ticket = self.tickets.get(frame.request_id)
        if ticket is None:
            return  # it ended here (stop string, abort) before the engine heard of it
        if ticket.instance is not instance:
            # Not its business any more, or never was. That it has heard an abort is no news.
            self.num_stale_frames += frame.finish_reason is not FinishReason.ABORT
            return
        if frame.last and frame.attempt == ticket.journal.attempt and self._not_here(ticket, instance, frame):
            return
        ticket.live.deliver(frame)

    def on_delta(self, ticket: Ticket, delta: Delta, now_s: float) -> None:
        """Output was committed."""
        if ticket.answered:
            ticket.grow(len(delta.token_ids))
            return
        ticket.answer()
        self._moves.answered(ticket.live.request_id)
        self._prefixes.answered(ticket.live.request_id)
        if ticket.gap_from_s is not None:
            gap_s, ticket.gap_from_s = now_s - ticket.gap_from_s, None
            self._observer.on_resumed(ticket.live.request_id, ticket.last_name, gap_s)
        if self._queue.caught_up(ticket.live.request_id):
            self.pump()

    def _not_here(self, ticket: Ticket, instance: Instance, frame: Frame) -> bool:
        """Whether the attempt ends because of the instance and not of the request: then it goes elsewhere."""
        if frame.error is None:
            # Nobody here asked for that: the engine ends its requests because it is itself about to end.
            given_up = frame.finish_reason is FinishReason.ABORT
            if given_up:
                pause_s = retry_delay_s(ticket.num_moves)
                self._take_back(ticket, instance, "given_up", self._clock.monotonic_s() + pause_s)
                self.pump()
            return given_up
        error = frame.error.to_error()
        # A smaller engine cannot take what a larger one had begun; that is no fault of the request.
        too_small = isinstance(error, RequestError) and ticket.has_begun
        if too_small or isinstance(error, CapacityError | UnavailableError):
            self._refused(ticket, instance, error)
            return True
        return False

    def _refused(self, ticket: Ticket, instance: Instance, error: XllmError) -> None:
        """The instance would not take it. Its client sees that only if nobody will and nothing has begun."""
        self._leave(ticket, "refused")
        ticket.avoid = instance
        ticket.num_refusals += 1
        ticket.refused_by.add(instance.name)
        if error.code == "draining":
            self._on_draining(instance)
        elif not ticket.has_begun or isinstance(error, RequestError):
            others = [i for i in self._catalogue.routable(ticket.model_id) if i.name not in ticket.refused_by]
            if not others or ticket.num_refusals > MAX_REFUSALS:
                ticket.live.fail(error, abort=False)
                return
        not_before_s = self._clock.monotonic_s() + retry_delay_s(ticket.num_refusals - 1)
        self._queue.wait(ticket.live.request_id, ticket.age, not_before_s=not_before_s)
        self.pump()

    # -- handing over -----------------------------------------------------------------------------------

    def move(self, request_id: str, target: str, reason: Reason = "asked") -> str:
        """Let a running request go on at the instance of that name. "" = it is under way; else why not.

        Until it is there it runs where it is; whatever fails on the way leaves it there.
        """
        ticket, instance = self.tickets.get(request_id), self._catalogue.get(target)
        if ticket is None:
            return "no_such_request"
        return "target_gone" if instance is None else self._moves.begin(ticket, instance, reason)

    def moved(self, instance: Instance, message: Moved) -> None:
        """The answer to a Move."""
        move = self._moves.settle(instance, message)
        ticket = self.tickets.get(message.request_id)
        if ticket is None or ticket.instance is not instance or message.error is not None:
            return
        if message.attempt != ticket.journal.attempt:
            return
        if move is not None and move.target.routable:
            self._switch(ticket, move)
            return
        # It holds still there, and nobody waits for it or nobody is there to take it: it goes on anywhere.
        # The cheapest place is where it was, whose pages are all there.
        instance.post(Abort(request_id=message.request_id, attempt=message.attempt))
        self._take_back(ticket, instance, "handover", 0.0)
        ticket.avoid = None
        self.pump()

    def deserted(self, instance: Instance) -> None:
        """Nothing is to be moved there any more."""
        self._moves.deserted(instance)

    def _switch(self, ticket: Ticket, move: Pending) -> None:
        """Its sequences hold still, and the target has them: from here on it is the target's.

        The new attempt is posted before the old one is ended, so that there is no moment in which no engine
        has the request.
        """
        target = move.target
        self._leave(ticket, "handed_over")
        if ticket.gap_from_s is None:
            ticket.gap_from_s = ticket.last_s
        ticket.num_handovers += 1
        choice = self._placer.direct(
            ticket.journal.spec,
            target,
            reasons=(f"handover={move.reason}", f"from={move.source.name}"),
            num_matched=ticket.num_tokens - 1,
        )
        self._note_class(ticket, target)
        self._place(
            ticket, choice, ticket.live.begin_attempt(), transfer_id=move.transfer_id, sources=move.sources
        )
        self._moves.release(move)

    def _drop_offer(self, ticket: Ticket) -> None:
        """Nobody will go where its pages may be."""
        if ticket.offer is not None:
            target, transfer_id = ticket.offer
            ticket.offer = None
            target.post(CancelTransfer(transfer_id=transfer_id))

    # -- moving ---------------------------------------------------------------------------------------

    def evict(self, instance: Instance, cause: str, *, hold: bool = False) -> tuple[str, ...]:
        """Take all requests off the instance, oldest first; with `hold` they wait for a verdict."""
        self._moves.deserted(instance)
        evicted = sorted((self.tickets[rid] for rid in instance.requests), key=lambda t: t.age)
        for ticket in evicted:
            instance.post(Abort(request_id=ticket.live.request_id, attempt=ticket.journal.attempt))
            self._take_back(ticket, instance, cause, math.inf if hold else 0.0)
        if not hold:
            self.pump()
        return tuple(t.live.request_id for t in evicted)

    def _take_back(self, ticket: Ticket, instance: Instance, cause: str, not_before_s: float) -> None:
        # Once it has answered, all but the last of its pages may be where it was being moved.
        began = ticket.answered
        _, move = self._leave(ticket, cause, keep_target=began)
        if move is not None and began:
            ticket.offer = (move.target, move.transfer_id)
        ticket.avoid = instance
        ticket.num_moves += 1
        ticket.moved_from, ticket.moved_cause = instance, cause
        if ticket.gap_from_s is None:
            ticket.gap_from_s = ticket.last_s
        self.num_moves[cause] += 1
        self._queue.wait(ticket.live.request_id, ticket.age, not_before_s=not_before_s)

    def acquit(self, instance: Instance) -> None:
        """It was suspected and is back: nobody killed it."""
        self._blame.acquit(instance.name)

    def judge(self, request_ids: Sequence[str], cause: DeathCause | None, instance: Instance) -> None:
        """Let held requests go on, but for those that the death convicts. None = nobody is to blame."""
        for request_id in request_ids:
            ticket = self.tickets.get(request_id)
            if ticket is None or ticket.instance is not None:
                continue
            committed = ticket.journal.num_committed
            if cause is not None and self._blame.death(request_id, committed, cause, instance.name):
                self.num_quarantined += 1
                log.error("request %s is quarantined: engines die of it", request_id)
                message = "engines failed repeatedly while they worked on this request"
                ticket.live.fail(InternalError(message, code="request_quarantined"), abort=False)
            else:
                self._queue.wait(request_id, ticket.age)
        self.pump()

    def pump(self) -> None:
        """Place whoever waits and can go somewhere."""
        if self._pumping or not self._queue.num_waiting:
            return
        self._pumping = True
        full: set[str] = set()
        try:
            for request_id in self._queue.due(self._clock.monotonic_s()):
                if self._queue.is_waiting(request_id):
                    self._try(self.tickets[request_id], full)
        finally:
            self._pumping = False

    def expire(self) -> None:
        """End those that have had no instance to go to for too long, and moves that were not answered."""
        self._moves.expire(self._clock.monotonic_s())
        for request_id in self._queue.expired(self._clock.monotonic_s(), self._config.recovery_grace_s):
            self.tickets[request_id].live.fail(no_instance(), abort=False)

    def _try(self, ticket: Ticket, full: set[str]) -> None:
        """`full`: models that this pump has no more room for; with hundreds waiting one look must do."""
        if ticket.model_id in full:
            return
        request_id, journal = ticket.live.request_id, ticket.journal
        candidates = self._catalogue.routable(ticket.model_id)
        self._queue.alone(request_id, self._clock.monotonic_s(), alone=not candidates)
        if candidates and not any(self._queue.has_room(i.name, at_risk=False) for i in candidates):
            # All of them have somewhere to go, be it later.
            for other in self.tickets.values():
                if other.model_id == ticket.model_id:
                    self._queue.alone(other.live.request_id, 0.0, alone=False)
            full.add(ticket.model_id)
            return
        at_risk = self._blame.at_risk(request_id, journal.num_committed)
        open_ = [i for i in preferred(ticket, candidates) if self._queue.has_room(i.name, at_risk=at_risk)]
        if not open_:
            return
        offer = ticket.offer
        try:
            chosen = self._at_offer(ticket, open_) or self._placer.choose(
                journal.spec,
                open_,
                emitted=journal.choices[0].tokens,
                num_emitted=journal.num_committed,
                attempt=journal.attempt + 1,
            )
        except Exception:
            # A policy's bug, or a user's policy: it costs this request, never the others that wait.
            log.exception("request %s: the router failed", request_id)
            ticket.live.fail(InternalError("the router failed on this request"), abort=False)
            return
        if chosen is None:
            return
        self._queue.took_over(request_id, chosen.instance.name, at_risk=at_risk)
        self._note_class(ticket, chosen.instance)
        transfer_id = ""
        if offer is not None and offer[0] is chosen.instance:
            transfer_id, ticket.offer = offer[1], None
        self._drop_offer(ticket)
        self._place(ticket, chosen, ticket.live.begin_attempt(), transfer_id=transfer_id)

    def _at_offer(self, ticket: Ticket, open_: Sequence[Instance]) -> Choice | None:
        """Where it was being moved when it lost its instance: what arrived there need not be computed."""
        if ticket.offer is None or ticket.offer[0] not in open_:
            return None
        spec, reasons = ticket.journal.spec, ("handover=cut_off", f"from={ticket.last_name}")
        return self._placer.direct(spec, ticket.offer[0], reasons=reasons)

    def _note_class(self, ticket: Ticket, instance: Instance) -> None:
        """Tokens of another class, or of one that promises nothing, may go on differently: say so."""
        card = instance.card
        same = card.numerics_class == ticket.numerics_class and card.deterministic
        if ticket.journal.num_committed > 0 and not same:
            ticket.nonexact = True
            self.num_nonexact += 1
            log.warning(
                "request %s resumes on %s, whose numerics differ: an undisturbed run might differ",
                ticket.live.request_id,
                instance.name,
            )

    def _leave(
        self, ticket: Ticket, code: str, *, keep_target: bool = False
    ) -> tuple[Instance | None, Pending | None]:
        """Off its instance; where it was, and the move that this has cut off."""
        request_id = ticket.live.request_id
        self._placer.settled(request_id)
        self._prefixes.left(request_id)
        move = self._moves.left(request_id, code, keep_target=keep_target)
        return ticket.leave(), move

    def _place(
        self,
        ticket: Ticket,
        choice: Choice,
        spec: RequestSpec,
        *,
        transfer_id: str = "",
        sources: tuple[str, ...] = (),
    ) -> None:
        instance = choice.instance
        ticket.enter(instance, choice.num_matched)
        ticket.numerics_class = instance.card.numerics_class
        self._admission.placed(spec.request_id, instance.name)
        if not transfer_id:
            transfer_id = self._prefixes.order(spec, choice, ticket.num_tokens)
        instance.post(Submit(spec=spec, transfer_id=transfer_id, sources=sources))
        self._observer.on_placed(spec.request_id, choice.placement, spec.attempt)
        if choice.decode is not None and spec.params.max_tokens != 1:
            self._moves.plan(ticket, choice.decode)
        source = ticket.moved_from
        if source is None:
            return
        ticket.moved_from = None
        gap_s = self._clock.monotonic_s() - ticket.last_s
        cost = price(
            source,
            instance,
            self._links,
            num_tokens=ticket.num_tokens,
            num_matched=choice.num_matched,
            # Had it been able to wait for a transfer it would have been moved while it ran (`relocation`).
            obstacle=why_not(source, instance, num_tokens=ticket.num_tokens) or "taken_off_at_once",
        )
        self._observer.on_moved(spec.request_id, source.name, instance.name, ticket.moved_cause, gap_s, cost)
