"""The step thread's hand-over: messages of fronts and events of the transfers to the side that they concern.

Owned by the engine core, which says when a step begins and ends. Without transfers every Move is refused.
Everything here thinks of one step at a time, so it first waits for the one that is under way.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm.engine.kvtransfer.base import (
    Arrived,
    Asked,
    Failed,
    Offered,
    Released,
    Sent,
    TransferEvent,
    Transfers,
)
from xllm.engine.memory.manager import PageManager
from xllm.engine.moving.counters import MoveCounters
from xllm.engine.moving.receiver import Receiver
from xllm.engine.moving.sender import Answers, Sender
from xllm.engine.plan import StepPlan
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.errors import ErrorInfo
from xllm.wire.messages import Fetch, Move, Moved


class Mover:
    """`settle` carries out the page copies that are due; `quiesce` waits until no step is under way. Time is
    an argument."""

    def __init__(
        self,
        scheduler: Scheduler,
        memory: PageManager,
        transfers: Transfers,
        *,
        settle: Callable[[], None],
        quiesce: Callable[[], None],
    ) -> None:
        self.counters = MoveCounters()
        self._scheduler = scheduler
        self._transfers = transfers
        self._quiesce = quiesce
        self._sender = Sender(scheduler, memory.leases, transfers, self.counters, settle)
        self._receiver = Receiver(scheduler, memory.leases, transfers, self.counters, settle)

    @property
    def is_waiting(self) -> bool:
        """Time alone may change something, so `tick` is to be called even where nothing runs."""
        return self._sender.is_waiting or len(self._receiver) > 0

    @property
    def needs_quiet(self) -> bool:
        """Pages of a request are on their way out: what a step writes is read while it runs."""
        return self._sender.is_moving

    @property
    def has_pins(self) -> bool:
        """A peer is about to read our pages, or may be at it."""
        return self._sender.has_pins

    def drain(self) -> None:
        """Take nothing over any more."""
        self._receiver.draining = True

    def move(self, owner: int, message: Move, now_s: float) -> None:
        self._quiesce()
        self._sender.move(owner, message, now_s)

    def fetch(self, message: Fetch) -> None:
        if message.transfer_id not in self._sender:
            self._receiver.fetch(message)

    def cancel(self, transfer_id: str) -> None:
        self._quiesce()
        self._sender.cancel(transfer_id)
        self._receiver.cancel(transfer_id)

    def submitted(
        self, request_id: str, owner: int, transfer_id: str, sources: tuple[str, ...], now_s: float
    ) -> None:
        """A request was accepted whose KV comes, or has come, under this name."""
        self._quiesce()
        request = self._scheduler.find(request_id, owner)
        if request is not None and transfer_id not in self._sender:
            self._receiver.submitted(request, transfer_id, sources, now_s)

    def on_event(self, event: TransferEvent, now_s: float) -> None:
        self._quiesce()
        match event:
            case Offered(transfer_id=transfer_id):
                if transfer_id in self._sender:
                    self._transfers.refuse(transfer_id, _TO_ITSELF)
                else:
                    self._receiver.offered(event)
            case Asked():
                self._sender.asked(event)
            case Arrived():
                self._receiver.arrived(event, now_s)
            case Sent():
                self._sender.sent(event)
            case Failed():
                self._sender.failed(event)
                self._receiver.failed(event.transfer_id)
            case Released(transfer_id=transfer_id):
                self._sender.released(transfer_id)
                self._receiver.released(transfer_id)

    def answer_early(self, event: Sent) -> tuple[int, Moved] | None:
        """(owner, answer) of a move that has just succeeded, once. The only call for another thread."""
        return self._sender.answer_early(event)

    def before_step(self, plan: StepPlan) -> None:
        self._sender.before_step(plan)

    def after_step(self, rerun: bool) -> None:
        self._sender.after_step(rerun)

    def tick(self, now_s: float) -> None:
        """Before the next step is planned. What is received touches no page of a step that is under way."""
        if self._sender.is_moving:
            self._quiesce()
        self._sender.tick(now_s)
        self._receiver.tick(now_s)

    def take_answers(self) -> Answers:
        """(owner, Moved), to be sent after the frames of all tokens drawn so far."""
        answers, self._sender.answers = self._sender.answers, []
        return answers


_TO_ITSELF = ErrorInfo(
    kind="UnavailableError", code="duplicate_transfer", message="an engine cannot move a request to itself"
)
