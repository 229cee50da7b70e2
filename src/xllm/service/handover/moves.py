"""The moves that are under way: who was told what, until when an answer is due, and what it was.

Bookkeeping and messages to both engines. Which request goes where is decided by others (`relocation`,
router), and what a request does next stands in `dispatch`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass

from xllm.clock import Clock
from xllm.config import FrontConfig
from xllm.ids import new_transfer_id
from xllm.service.handover.links import Links
from xllm.service.handover.pair import why_not
from xllm.service.handover.price import price
from xllm.service.handover.record import HandoverRecord, Outcome, Reason
from xllm.service.instances.instance import Instance
from xllm.service.snapshot import FrontObserver
from xllm.service.ticket import Ticket
from xllm.types import PAGE_SIZE
from xllm.wire.messages import Abort, CancelTransfer, Move, Moved

log = logging.getLogger(__name__)
decisions = logging.getLogger("xllm.decisions")

ANSWER_FLOOR_S = 2.0
ANSWER_FACTOR = 3.0
"""A move must be answered within max(floor, factor × predicted), counted from when it can get on."""
TARGET_GONE, TIMEOUT = "target_gone", "timeout"
"""The front's own codes; all others are the engines'."""
MAX_FAILURES = 512
"""Failed moves that wait for somebody to think again; beyond it the oldest are forgotten."""

_MAX_CODES = 32
_CODE = re.compile(r"[a-z0-9_]{1,40}")


@dataclass(slots=True, kw_only=True)
class Pending:
    """A Move that was posted and has not been answered. `due_s` None = the source is not so far yet."""

    ticket: Ticket
    request_id: str
    attempt: int
    transfer_id: str
    source: Instance
    target: Instance
    reason: Reason
    mode: str
    predicted_ms: float
    begun_s: float
    due_s: float | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """What the target must be told: where to fetch from; nothing where it is brought."""
        return self.source.about.endpoints if self.mode == "pull" else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A move that did not come about while its request goes on at the source."""

    request_id: str
    attempt: int
    target: str
    reason: Reason
    code: str


class Moves:
    """At most one move of a request is under way. Every `begin` ends in one record to the observer."""

    def __init__(self, config: FrontConfig, clock: Clock, observer: FrontObserver, links: Links) -> None:
        self.num_by_outcome: Counter[tuple[str, str]] = Counter()
        self.num_failures: Counter[str] = Counter()
        self.num_late = 0
        self._config = config
        self._clock = clock
        self._observer = observer
        self._links = links
        self._pending: dict[str, Pending] = {}
        self._kept: dict[str, tuple[Instance, int]] = {}
        self._failures: list[Failure] = []

    def __len__(self) -> int:
        return len(self._pending)

    def get(self, request_id: str) -> Pending | None:
        return self._pending.get(request_id)

    def num_from(self, source: Instance) -> int:
        """Moves of the instance that can get on: what its data plane is busy with."""
        return sum(m.source is source and m.due_s is not None for m in self._pending.values())

    # -- beginning ----------------------------------------------------------------------------------

    def begin(self, ticket: Ticket, target: Instance, reason: Reason) -> str:
        """Order the request's instance to hand it over. "" = done; else why it cannot be."""
        source, request_id = ticket.instance, ticket.live.request_id
        if source is None:
            return "waiting"
        if request_id in self._pending:
            return "under_way"
        if why := why_not(source, target, num_tokens=ticket.num_tokens + 1):
            return why
        now_s = self._clock.monotonic_s()
        num_bytes = -(-ticket.num_tokens // PAGE_SIZE) * source.card.page_bytes
        move = Pending(
            ticket=ticket,
            request_id=request_id,
            attempt=ticket.journal.attempt,
            transfer_id=new_transfer_id(),
            source=source,
            target=target,
            reason=reason,
            mode=self._config.transfer_mode,
            predicted_ms=self._links.price(source.name, target.name).transfer_ms(num_bytes),
            begun_s=now_s,
        )
        self._pending[request_id] = move
        target.inbound[request_id] = ticket.num_tokens
        source.post(
            Move(
                request_id=request_id,
                attempt=move.attempt,
                transfer_id=move.transfer_id,
                endpoints=target.about.endpoints if move.mode == "push" else (),
                mode=move.mode,
            )
        )
        if ticket.answered:
            self._set_due(move, now_s)
        return ""

    def plan(self, ticket: Ticket, target: Instance) -> None:
        """It was placed where its prompt is computed, to go on at `target`; it stays if that cannot be, or
        if computing the prompt there once more would be faster than the link between them."""
        source, request_id = ticket.instance, ticket.live.request_id
        if source is None:
            return
        cost = price(source, target, self._links, num_tokens=ticket.num_tokens)
        pays = cost.migrates or self._links.known(source.name, target.name) is None
        if pays or cost.obstacle or self._links.probe(source.name, target.name):
            why = self.begin(ticket, target, "prefill")
        else:
            why = "slow_link"
        if why:
            self.num_by_outcome["prefill", "skipped"] += 1
            decisions.info(
                "request %s stays at %s after its prompt: %s; %s", request_id, source.name, why, cost
            )

    def answered(self, request_id: str) -> None:
        """The first output of the present attempt has come: the prompt is computed, so a move gets on now;
        and who had the request before is not needed any more."""
        move = self._pending.get(request_id)
        if move is not None and move.due_s is None:
            self._set_due(move, self._clock.monotonic_s())
        self._let_go(request_id)

    def _set_due(self, move: Pending, now_s: float) -> None:
        move.due_s = now_s + max(ANSWER_FLOOR_S, ANSWER_FACTOR * move.predicted_ms / 1000)

    # -- outcomes -----------------------------------------------------------------------------------

    def settle(self, instance: Instance, message: Moved) -> Pending | None:
        """The source's answer. None = nobody waits for that: given up, or of an attempt that is past."""
        move = self._pending.get(message.request_id)
        if move is None or move.source is not instance or move.transfer_id != message.transfer_id:
            self.num_late += 1
            return None
        if message.error is not None:
            # It may not have told the target; there the lease would stand until its time is over.
            move.target.post(CancelTransfer(transfer_id=move.transfer_id))
            self._failed(move, message.error.code, message)
            return None
        if message.num_bytes > 0 and message.transfer_ms > 0:
            self._links.observe(move.source.name, move.target.name, message.num_bytes, message.transfer_ms)
        self._close(move, "done", "", message)
        return move

    def left(self, request_id: str, code: str, *, keep_target: bool = False) -> Pending | None:
        """The request has ended or is not at its instance any more; the move that this cuts off, if any.

        With `keep_target` what has arrived there is kept: the request may go there.
        """
        self._let_go(request_id)
        move = self._pending.get(request_id)
        if move is None:
            return None
        self._cancel(move, keep_target=keep_target)
        self._close(move, "unneeded", code)
        return move

    def deserted(self, instance: Instance) -> None:
        """Nothing can be moved to this instance any more; its requests to come stay where they are."""
        for move in [m for m in self._pending.values() if m.target is instance]:
            self._cancel(move)
            self._failed(move, TARGET_GONE)

    def expire(self, now_s: float) -> None:
        """Give up what was not answered in time."""
        for move in [m for m in self._pending.values() if m.due_s is not None and now_s >= m.due_s]:
            log.warning(
                "request %s: its move from %s to %s is not done after %.1f s (predicted %.1f ms); given up",
                move.request_id,
                move.source.name,
                move.target.name,
                now_s - move.begun_s,
                move.predicted_ms,
            )
            self._cancel(move)
            self._failed(move, TIMEOUT)

    def take_failures(self) -> list[Failure]:
        """Those since the last call; their requests go on at the source, and may be moved elsewhere."""
        failures, self._failures = self._failures, []
        return failures

    # -- the source's part of a pull ------------------------------------------------------------------

    def release(self, move: Pending) -> None:
        """The target has been told to go on: end the old attempt at the source. What was brought is all
        there; what is fetched stays at the source until the target has answered."""
        if move.mode == "pull":
            self._kept[move.request_id] = (move.source, move.attempt)
            move.source.keep(move.request_id)
        else:
            move.source.post(Abort(request_id=move.request_id, attempt=move.attempt))

    def _let_go(self, request_id: str) -> None:
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            source, attempt = kept
            source.post(Abort(request_id=request_id, attempt=attempt))
            source.let_go(request_id)

    # -- inside ---------------------------------------------------------------------------------------

    def _cancel(self, move: Pending, *, keep_target: bool = False) -> None:
        message = CancelTransfer(transfer_id=move.transfer_id)
        move.source.post(message)
        if not keep_target:
            move.target.post(message)

    def _failed(self, move: Pending, code: str, message: Moved | None = None) -> None:
        # Codes become labels of a metric, and engines are not trusted to have few of them.
        known = _CODE.fullmatch(code) and (code in self.num_failures or len(self.num_failures) < _MAX_CODES)
        code = code if known else "other"
        self.num_failures[code] += 1
        move.ticket.failed_targets.append(move.target.name)
        failure = Failure(
            request_id=move.request_id,
            attempt=move.attempt,
            target=move.target.name,
            reason=move.reason,
            code=code,
        )
        self._failures = [*self._failures[1 - MAX_FAILURES :], failure]
        self._close(move, "failed", code, message)

    def _close(self, move: Pending, outcome: Outcome, code: str, message: Moved | None = None) -> None:
        del self._pending[move.request_id]
        move.target.inbound.pop(move.request_id, None)
        self.num_by_outcome[move.reason, outcome] += 1
        self._observer.on_handover(
            HandoverRecord(
                request_id=move.request_id,
                attempt=move.attempt,
                source=move.source.name,
                target=move.target.name,
                reason=move.reason,
                mode=move.mode,
                outcome=outcome,
                code=code,
                num_bytes=0 if message is None else int(_sane(message.num_bytes)),
                transfer_ms=0.0 if message is None else _sane(message.transfer_ms),
                exposed_ms=0.0 if message is None else _sane(message.exposed_ms),
                predicted_ms=move.predicted_ms,
                wait_s=self._clock.monotonic_s() - move.begun_s,
            )
        )


def _sane(told: float) -> float:
    """What an engine says of its transfer is summed up for good: nothing negative, endless or absurd."""
    return told if 0 <= told < 1e15 else 0.0
