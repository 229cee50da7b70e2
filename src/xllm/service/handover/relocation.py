"""Picks running requests that had better run elsewhere, and orders the move: off an instance that leaves,
off one that is too slow, and once more where a move failed.

Decides by `failover.decision` and `rebalance`; where to is the router's word. Moves nothing itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xllm.config import FrontConfig
from xllm.service.catalogue import Catalogue
from xllm.service.dispatch import Dispatch
from xllm.service.eligible import large_enough
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.links import Links
from xllm.service.handover.moves import TARGET_GONE, TIMEOUT, Moves
from xllm.service.handover.pair import why_not
from xllm.service.handover.price import price
from xllm.service.handover.rebalance import Running, rebalance, slowest
from xllm.service.handover.record import Reason
from xllm.service.instances.instance import Instance
from xllm.service.placer import Placer
from xllm.service.ticket import Ticket
from xllm.types import PAGE_SIZE

log = logging.getLogger(__name__)
decisions = logging.getLogger("xllm.decisions")

MAX_MOVES = 8
"""From one instance at a time: more would share its bytes per second and all come late."""
MAX_TRIES = {"prefill": 2, "drain": 6}
"""Moves of a request during its stay at one instance. Off one that leaves it is worth more of them: most
failures pass (no room now, preempted just then), and there is nothing better to wait for."""


class Relocation:
    """`tick` now and then; `off` whenever an instance that leaves may move another request."""

    def __init__(
        self,
        config: FrontConfig,
        catalogue: Catalogue,
        dispatch: Dispatch,
        placer: Placer,
        moves: Moves,
        links: Links,
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._dispatch = dispatch
        self._placer = placer
        self._moves = moves
        self._links = links

    def tick(self) -> None:
        self._again()
        for instance in self._catalogue.instances():
            if instance.draining and instance.alive and not instance.suspect:
                self.off(instance)
        if self._config.role_control == "adaptive":
            for model_id in sorted({i.card.model_id for i in self._catalogue.instances()}):
                self._balance(self._catalogue.routable(model_id))

    def off(self, instance: Instance) -> None:
        """Move its requests elsewhere, oldest first and a few at a time; those that recompute faster wait
        until the drain is due, since they may end before."""
        room = MAX_MOVES - self._moves.num_from(instance)
        for ticket in sorted(self._of(instance), key=lambda t: (not t.answered, t.age)):
            if room <= 0:
                return
            if self._moves.get(ticket.live.request_id) is None and self._move(ticket, "drain"):
                room -= ticket.answered

    # -- inside -----------------------------------------------------------------------------------------

    def _again(self) -> None:
        """What was to go on elsewhere after its prompt and did not: another target may take it."""
        for failure in self._moves.take_failures():
            ticket = self._dispatch.tickets.get(failure.request_id)
            if ticket is None or ticket.instance is None or failure.attempt != ticket.journal.attempt:
                continue
            if failure.reason == "prefill" and ticket.instance.routable:
                # What an engine refuses it may take a moment later; a silent one stays silent.
                self._move(ticket, "prefill", elsewhere=failure.code in (TARGET_GONE, TIMEOUT))

    def _move(self, ticket: Ticket, reason: Reason, *, elsewhere: bool = False) -> bool:
        """Whether it is under way; with `elsewhere` only to where it was not tried before."""
        source, request_id = ticket.instance, ticket.live.request_id
        if source is None or ticket.stays or len(ticket.failed_targets) >= MAX_TRIES.get(reason, 1):
            return False
        target, num_matched = self._target(ticket, source, elsewhere)
        if target is None:
            return False
        cost = price(source, target, self._links, num_tokens=ticket.num_tokens, num_matched=num_matched)
        if not cost.migrates and not self._links.probe(source.name, target.name):
            ticket.stays = True
            self._tell(request_id, source, target, reason, cost)
            return False
        if self._dispatch.move(request_id, target.name, reason):
            return False
        self._tell(request_id, source, target, reason, cost)
        return True

    def _target(self, ticket: Ticket, source: Instance, elsewhere: bool) -> tuple[Instance | None, int]:
        """Where the router would have it decode, of those that can take its pages; and what is there."""
        journal, need = ticket.journal, ticket.num_tokens + 1
        able = [
            i
            for i in large_enough(journal.spec, self._catalogue.routable(ticket.model_id))
            if not why_not(source, i, num_tokens=need)
        ]
        candidates = [i for i in able if i.name not in ticket.failed_targets]
        if not elsewhere:
            candidates = candidates or able
        if not candidates:
            return None, 0
        try:
            choice = self._placer.choose(
                journal.spec,
                candidates,
                emitted=journal.choices[0].tokens,
                num_emitted=journal.num_committed,
                attempt=journal.attempt + 1,
                remember=False,
            )
        except Exception:
            # A policy's bug must not keep an instance from leaving: the request stays until it is due.
            log.exception("request %s: the router failed", ticket.live.request_id)
            return None, 0
        if choice is None:
            return None, 0
        target = choice.instance if choice.decode is None else choice.decode
        return target, choice.holders.get(target.name, 0) * PAGE_SIZE

    def _balance(self, instances: Sequence[Instance]) -> None:
        views = self._placer.views(instances)
        found = slowest([v for v in views if v.num_reqs], self._config.slo_tpot_ms)
        if found is None:
            return
        view, source_ms = found
        source = self._catalogue.get(view.name)
        if source is None or self._moves.num_from(source):
            return  # the last move must show in the numbers before the next is thought of
        tickets = {t.live.request_id: t for t in self._of(source) if t.answered and not t.failed_targets}
        running = [_running(t) for t in tickets.values() if self._moves.get(t.live.request_id) is None]
        best = rebalance(view, source_ms, views, running)
        target = None if best is None else self._catalogue.get(best.target)
        if best is None or target is None:
            return
        ticket = tickets[best.request_id]
        cost = price(source, target, self._links, num_tokens=ticket.num_tokens)
        if cost.migrates and (cost.migrate_ms or 0.0) < best.gain_ms:
            self._tell(best.request_id, source, target, "rebalance", cost)
            self._dispatch.move(best.request_id, target.name, "rebalance")

    def _of(self, instance: Instance) -> list[Ticket]:
        return [self._dispatch.tickets[request_id] for request_id in sorted(instance.requests)]

    def _tell(self, request_id: str, source: Instance, target: Instance, reason: str, cost: MoveCost) -> None:
        decisions.info(
            "request %s, %s, from %s to %s: %s", request_id, reason, source.name, target.name, cost
        )


def _running(ticket: Ticket) -> Running:
    choices = ticket.journal.choices
    open_ = [c for c in choices if c.finish_reason is None]
    most = ticket.journal.spec.params.max_tokens or 0
    return Running(
        request_id=ticket.live.request_id,
        num_tokens=ticket.num_tokens,
        num_sequences=len(open_),
        num_left=max((most - len(c.tokens) for c in open_), default=0),
    )
