"""The sending side: sends a request's pages while it runs, holds it still, sends the rest, answers.

Invariant: each Move is answered once. A failure before the end lets the sequences go on here; pages stay
pinned until the transfers have said Released.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from xllm.engine.kvtransfer.base import (
    Asked,
    ChoiceState,
    Failed,
    Manifest,
    Pushed,
    Sent,
    Slots,
    Transfers,
)
from xllm.engine.memory.leases import Leases
from xllm.engine.memory.manager import pages_for
from xllm.engine.moving.counters import MoveCounters
from xllm.engine.moving.outgoing import Outgoing, Phase, list_pages, manifest_of, size_of
from xllm.engine.plan import StepPlan
from xllm.engine.request import Request, Sequence
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.errors import ErrorInfo
from xllm.types import PAGE_SIZE
from xllm.wire.messages import Move, Moved

LITTLE_PAGES = 2
"""So many pages per sequence may be pending when the sequences are held: it takes less than a step."""
PROMPT_PAGES = 16
"""The same of a prompt that has just been computed: its sequence would be held up longer by the next step of
this instance, which is about prompts, than by the rest of its last chunk."""
KEEP_S = 10.0
"""A receiver that is to pull has so long to ask."""
MAX_GIVEN = 64
"""Prefixes given at a time; their pages cannot be evicted meanwhile."""

Answers = list[tuple[int, Moved]]


class Sender:
    """Owns the moves out of this engine. `answers` are (owner, Moved), for after the frames."""

    def __init__(
        self,
        scheduler: Scheduler,
        leases: Leases,
        transfers: Transfers,
        counters: MoveCounters,
        settle: Callable[[], None],
    ) -> None:
        """`settle` carries out the page copies that are due."""
        self._scheduler = scheduler
        self._leases = leases
        self._transfers = transfers
        self._counters = counters
        self._settle = settle
        self._moves: dict[str, Outgoing] = {}
        self._given: dict[str, Slots] = {}
        # What is to be said of moves that are about to succeed: whoever takes it out says it, the step thread
        # or the transfers' own.
        self._successes: dict[str, tuple[int, Moved]] = {}
        self.answers: Answers = []

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._moves or transfer_id in self._given

    @property
    def has_pins(self) -> bool:
        """Somebody may still read our pages, or is about to."""
        return bool(self._given) or any(not m.released for m in self._moves.values())

    @property
    def is_moving(self) -> bool:
        """A request may be read, or is held, for its way out."""
        return any(m.phase is not Phase.DONE and m.phase is not Phase.FAILED for m in self._moves.values())

    @property
    def is_waiting(self) -> bool:
        """Something may be due although no step runs and no event comes."""
        return any(m.phase is not Phase.DONE or m.request.ended for m in self._moves.values())

    # -- from the front -------------------------------------------------------------------------

    def move(self, owner: int, message: Move, now_s: float) -> None:
        request = self._scheduler.find(message.request_id, owner)
        if request is None or request.spec.attempt != message.attempt:
            self._refuse(owner, message, _NOT_HERE)
        elif message.transfer_id in self or not message.transfer_id or self._is_moving(request):
            self._refuse(owner, message, _ALREADY_MOVING)
        else:
            move = Outgoing(
                owner=owner,
                attempt=message.attempt,
                transfer_id=message.transfer_id,
                endpoints=message.endpoints,
                pull=message.mode == "pull",
                request=request,
                drawn={s.seq_id: s.num_output for s in request.sequences},
                pinned=[{} for _ in range(self._leases.num_groups)],
            )
            self._moves[message.transfer_id] = move
            self._advance(move, now_s)

    def cancel(self, transfer_id: str) -> None:
        """The front gives it up; after a success, too: the sequences go on here then."""
        move = self._moves.get(transfer_id)
        if move is None:
            if transfer_id in self._given:
                self._transfers.cancel(transfer_id)
        elif move.phase is Phase.DONE:
            self._scheduler.hold(move.request, False)
            self._forget(move)
        else:
            self._fail(move, _CANCELLED)

    # -- from the transfers ---------------------------------------------------------------------

    def sent(self, event: Sent) -> None:
        self._counters.sent_bytes += event.num_bytes
        move = self._moves.get(event.transfer_id)
        if move is not None and move.phase is Phase.FINISHING:
            self._succeed(move, event)

    def answer_early(self, event: Sent) -> tuple[int, Moved] | None:
        """For the transfers' thread: the answer, if nobody has given one. All frames have left before."""
        owner, moved = self._successes.pop(event.transfer_id, (0, None))
        return None if moved is None else (owner, _told_of(moved, event))

    def failed(self, event: Failed) -> None:
        move = self._moves.get(event.transfer_id)
        if move is None or move.phase in (Phase.FAILED, Phase.DONE):
            return
        self._counters.num_failed += 1
        if move.pull:
            # The front has its answer, and the receiver computes what it could not fetch.
            move.phase = Phase.DONE
        else:
            self._go_on(move, event.error)

    def released(self, transfer_id: str) -> None:
        given = self._given.pop(transfer_id, None)
        if given is not None:
            self._leases.let_go(given)
        move = self._moves.get(transfer_id)
        if move is not None:
            self._unpin(move)
            if move.phase is not Phase.DONE:
                self._forget(move)

    def asked(self, event: Asked) -> None:
        move = self._moves.get(event.transfer_id)
        if move is not None and move.phase is Phase.KEPT and not event.digests:
            move.phase = Phase.FINISHING
            pushed = Pushed(
                indices=tuple(tuple(known.values()) for known in move.pinned),
                pages=tuple(tuple(known) for known in move.pinned),
            )
            self._transfers.give(move.transfer_id, pushed, move.manifest or manifest_of(move))
        elif event.digests and event.transfer_id not in self and len(self._given) < MAX_GIVEN:
            self._give_prefix(event)
        else:
            self._transfers.refuse(event.transfer_id, _NOT_HERE)

    def _give_prefix(self, event: Asked) -> None:
        pages, keys = self._leases.cached(event.root, event.digests)
        if not keys:
            self._transfers.refuse(event.transfer_id, _NOT_CACHED)
            return
        for g, group in enumerate(pages):
            for page in group:
                self._leases.pin(g, page)
        self._given[event.transfer_id] = pages
        tokens = tuple(token for key in keys for token in key.tokens)
        manifest = Manifest(
            num_prompt=len(tokens),
            choices=(ChoiceState(choice=0, tokens=tokens, num_computed=len(tokens), pages=()),),
            root=event.root,
            digests=tuple(key.digest for key in keys),
        )
        indices = tuple(tuple(range(len(group))) for group in pages)
        self._transfers.give(event.transfer_id, Pushed(indices=indices, pages=pages), manifest)

    # -- around a step ----------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """Tell which pages the step completes: they are read layer by layer while it runs."""
        moves = [m for m in self._moves.values() if m.phase is Phase.COPYING and not m.pull]
        if not moves:
            return
        entries = {entry.seq_id: entry for entry in plan.sequences}
        for move in moves:
            if move.lost_pages():
                self._fail(move, _PREEMPTED)
                continue
            planned = [(s, entries[s.seq_id]) for s in move.live if s.seq_id in entries]
            if self._push(move, [(s, e.start // PAGE_SIZE) for s, e in planned]):
                ends = [(s, (e.start + len(e.tokens)) // PAGE_SIZE) for s, e in planned]
                self._push(move, ends, after_layer=True)

    def after_step(self, rerun: bool) -> None:
        """`rerun`: parts of the step were computed again, so what was read meanwhile may be half of it."""
        moves = [m for m in self._moves.values() if m.pushed_in_step]
        for move in moves:
            move.pushed_in_step = False
            if rerun and move.phase is Phase.COPYING:
                self._fail(move, _STEP_FAILED)
        if moves:
            self._transfers.step_done()

    def tick(self, now_s: float) -> None:
        """Between steps: go on with what can go on, and forget what has ended."""
        for move in tuple(self._moves.values()):
            match move.phase:
                case Phase.WAITING | Phase.COPYING:
                    self._advance(move, now_s)
                case Phase.KEPT:
                    if now_s >= move.expires_s:
                        self._unpin(move)
                        move.phase = Phase.DONE
                case Phase.FINISHING:
                    if move.request.ended and not move.pull:
                        self._fail(move, _ENDED)
                case Phase.DONE:
                    if move.request.ended and move.released:
                        self._forget(move)
                case Phase.FAILED:
                    pass

    def _advance(self, move: Outgoing, now_s: float) -> None:
        if move.request.ended:
            self._fail(move, _ENDED)
            return
        if move.lost_pages():
            self._fail(move, _PREEMPTED)
            return
        if move.phase is Phase.WAITING:
            size = size_of(move, self._leases)
            if size is None:
                return
            move.limits, move.phase = size, Phase.COPYING
            if not move.pull:
                move.request.moving = True
                self._transfers.send(move.transfer_id, move.endpoints, size)
        if move.pull:
            if move.is_ready():
                self._keep(move, now_s)
        elif self._push(move, [(s, s.num_computed // PAGE_SIZE) for s in move.live]) and move.is_ready():
            pending = self._transfers.num_pending(move.transfer_id)
            few = LITTLE_PAGES if any(move.drawn.values()) else PROMPT_PAGES
            if pending is not None and pending <= few * len(move.live):
                self._finish(move)

    def _finish(self, move: Outgoing) -> None:
        self._settle()
        self._scheduler.hold(move.request)
        if self._push(move, _all_pages(move)):
            move.phase = Phase.FINISHING
            self._successes[move.transfer_id] = (move.owner, _moved(move))
            self._transfers.finish(move.transfer_id, manifest_of(move))

    def _keep(self, move: Outgoing, now_s: float) -> None:
        """Pull: pinned and described now, since the front may end the attempt before the receiver asks."""
        self._settle()
        self._scheduler.hold(move.request)
        move.limits = size_of(move, self._leases) or move.limits
        move.request.moving = True
        list_pages(move, self._leases, _all_pages(move))
        move.manifest = manifest_of(move)
        move.phase, move.expires_s = Phase.KEPT, now_s + KEEP_S
        self._answer(move, None)

    def _push(self, move: Outgoing, ends: list[tuple[Sequence, int]], after_layer: bool = False) -> bool:
        """Push what is new of the leading pages; False = the move has failed."""
        try:
            pushed = list_pages(move, self._leases, ends, after_layer)
        except OverflowError:
            self._fail(move, _TOO_SLOW)
            return False
        if pushed is not None:
            move.pushed_in_step |= after_layer
            self._transfers.push(move.transfer_id, pushed)
        return True

    # -- ends -------------------------------------------------------------------------------------

    def _succeed(self, move: Outgoing, event: Sent) -> None:
        move.phase = Phase.DONE
        self._counters.num_out += 1
        self._answer(move, None, event)

    def _fail(self, move: Outgoing, error: ErrorInfo) -> None:
        """We give it up, on our own or because the front says so."""
        if move.phase is Phase.FAILED:
            return
        self._counters.num_failed += 1
        started = move.phase is Phase.FINISHING or (move.phase is Phase.COPYING and not move.pull)
        self._go_on(move, error)
        if started:
            self._transfers.cancel(move.transfer_id)
        else:
            self._unpin(move)
            self._forget(move)

    def _go_on(self, move: Outgoing, error: ErrorInfo) -> None:
        """The sequences stay here."""
        move.phase = Phase.FAILED
        if not move.request.ended:
            self._scheduler.hold(move.request, False)
        self._answer(move, error)

    def _unpin(self, move: Outgoing) -> None:
        if not move.released:
            move.released = True
            self._leases.let_go(move.pinned)
            move.request.moving = any(
                m.request is move.request and not m.released for m in self._moves.values()
            )

    def _forget(self, move: Outgoing) -> None:
        """A success may be taken back before the transfers have let go; `tick` sees to the rest then."""
        if move.released:
            del self._moves[move.transfer_id]
        else:
            move.phase = Phase.FAILED

    def _answer(self, move: Outgoing, error: ErrorInfo | None, sent: Sent | None = None) -> None:
        if move.answered:
            return
        move.answered = True
        was_due = move.phase is Phase.DONE and sent is not None
        if self._successes.pop(move.transfer_id, None) is None and was_due:
            return  # the transfers' thread has said it
        moved = _moved(move, error)
        self.answers.append((move.owner, moved if sent is None else _told_of(moved, sent)))

    def _refuse(self, owner: int, message: Move, error: ErrorInfo) -> None:
        self._counters.num_failed += 1
        self.answers.append(
            (
                owner,
                Moved(
                    request_id=message.request_id,
                    attempt=message.attempt,
                    transfer_id=message.transfer_id,
                    error=error,
                ),
            )
        )

    def _is_moving(self, request: Request) -> bool:
        return any(m.request is request and m.phase is not Phase.FAILED for m in self._moves.values())


def _moved(move: Outgoing, error: ErrorInfo | None = None) -> Moved:
    return Moved(
        request_id=move.request.spec.request_id,
        attempt=move.attempt,
        transfer_id=move.transfer_id,
        error=error,
    )


def _told_of(moved: Moved, sent: Sent) -> Moved:
    return msgspec.structs.replace(
        moved, num_bytes=sent.num_bytes, transfer_ms=sent.transfer_ms, exposed_ms=sent.exposed_ms
    )


def _all_pages(move: Outgoing) -> list[tuple[Sequence, int]]:
    return [(seq, pages_for(seq.num_computed)) for seq in move.live]


def _error(code: str, message: str) -> ErrorInfo:
    return ErrorInfo(kind="UnavailableError", code=code, message=message)


_NOT_HERE = _error("not_here", "the request, in this attempt, is not (or no longer) on this engine")
_ALREADY_MOVING = _error("already_moving", "the request is being moved already; cancel that transfer first")
_ENDED = _error("request_ended", "the request ended before it could be handed over")
_PREEMPTED = _error("preempted", "the request lost its pages to another one; move it again later")
_TOO_SLOW = _error("transfer_too_slow", "the request grew faster than it could be copied")
_STEP_FAILED = _error("step_failed", "a step had to be computed again while its pages were read")
_CANCELLED = _error("transfer_cancelled", "the transfer was given up by its front")
_NOT_CACHED = _error("not_cached", "these pages are not (or no longer) in the prefix cache")
