"""What a scheduler knows, and the changes of it that every part of the scheduler makes in the same way.

Sequences come, lose their pages, end; a request ends once. Who, and when, is decided in `planning` (room) and
`absorb` (results).
"""

from __future__ import annotations

import bisect
from operator import attrgetter

from xllm.engine.memory.manager import PageManager
from xllm.engine.plan import PageCopy
from xllm.engine.request import Request, Sequence, SequenceState
from xllm.engine.scheduler.counters import Counters
from xllm.engine.scheduler.flights import Flights
from xllm.engine.scheduler.load import Load
from xllm.engine.scheduler.order import Order
from xllm.engine.scheduler.outputs import FrameBuilder
from xllm.errors import ErrorInfo
from xllm.types import FinishReason

rank_of = attrgetter("rank")


class Books:
    """Of one engine; the step thread's.

    Invariants: a sequence is in exactly one of `waiting`, `running`, ended; both lists are sorted by rank;
    every accepted request yields one frame with `last`.
    """

    def __init__(self, memory: PageManager, order: Order) -> None:
        self.memory = memory
        self.order = order
        self.requests: dict[tuple[int, str], Request] = {}
        self.owner: dict[int, Request] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.flights = Flights(memory.release)
        self.copies: list[PageCopy] = []
        """Page copies that are due: with the next plan, or before pages change hands otherwise."""
        self.frames = FrameBuilder()
        self.counters = Counters()
        self.load = Load()
        self._next_seq_id = 0

    # -- sequences ------------------------------------------------------------------------------

    def add(
        self, request: Request, choice: int, draws: tuple[int, ...], tokens: tuple[int, ...]
    ) -> Sequence:
        seq = Sequence(
            seq_id=self._next_seq_id,
            choice=choice,
            tokens=list(tokens),
            prompt_len=len(request.prompt),
            draws=draws,
            rank=(*self.order.key(request.spec, request.arrival), choice),
        )
        # What an earlier attempt emitted is in the front's log already.
        emitted = request.spec.emitted[choice] if choice < len(request.spec.emitted) else ()
        seq.num_committed = seq.num_streamed = len(emitted)
        self._next_seq_id += 1
        self.owner[seq.seq_id] = request
        request.sequences.append(seq)
        self.load.count(seq)
        bisect.insort(self.waiting, seq, key=rank_of)
        return seq

    def run(self, seq: Sequence) -> None:
        """A waiting one gets a seat."""
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=rank_of)
        seq.state = SequenceState.RUNNING

    def unseat(self, seq: Sequence) -> None:
        """A running one waits in its old place; its pages are another matter."""
        self.running.remove(seq)
        seq.state = SequenceState.WAITING
        bisect.insort(self.waiting, seq, key=rank_of)

    def drop_pages(self, seq: Sequence) -> None:
        """It is behind by everything again."""
        self.flights.leave(seq)
        seq.num_computed = 0
        self.load.count(seq)

    def preempt(self, seq: Sequence) -> None:
        """Free the pages; a running sequence waits in its old place."""
        self.drop_pages(seq)
        request = self.owner[seq.seq_id]
        if request.wants_prompt_logprobs:
            request.prompt_logprobs.clear()
        if seq.state is SequenceState.RUNNING:
            self.counters.num_preemptions += 1
            request.num_preemptions += 1
            self.unseat(seq)

    def end_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state is SequenceState.RUNNING:
            self.running.remove(seq)
        elif seq.state is SequenceState.WAITING:
            self.waiting.remove(seq)
        self.drop_pages(seq)
        self.load.drop(seq)
        seq.state = SequenceState.ENDED
        seq.finish_reason = reason
        self.owner.pop(seq.seq_id, None)

    # -- requests -------------------------------------------------------------------------------

    def end_request(self, request: Request, reason: FinishReason, error: ErrorInfo | None) -> None:
        for seq in request.sequences:
            if seq.state is not SequenceState.ENDED:
                self.end_sequence(seq, reason)
        self.frames.terminal(request, reason, error)
        self.forget(request)

    def forget(self, request: Request) -> None:
        """Its last frame is made."""
        self.counters.num_ended += 1
        request.ended = True
        del self.requests[request.key]
