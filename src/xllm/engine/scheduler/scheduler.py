"""The scheduler: takes requests, plans steps, absorbs their results. Pure policy over its own books.

No torch, no clock reading, no I/O. Charter: what a step *does* belongs to the runner, what a page *is* to the
platform. Here is what others call; what is planned is decided in `planning`, what follows from a result in
`absorb`, and what is *sent* is made in `outputs`.
"""

from __future__ import annotations

from collections.abc import Iterator

from xllm.config import SchedulerConfig
from xllm.engine.kvtransfer.base import Manifest, Slots
from xllm.engine.memory.manager import PageManager
from xllm.engine.plan import StepPlan, StepResult
from xllm.engine.request import Request, Sequence
from xllm.engine.scheduler.absorb import Absorber
from xllm.engine.scheduler.books import Books
from xllm.engine.scheduler.claim import claim_pages
from xllm.engine.scheduler.deadlines import Deadlines
from xllm.engine.scheduler.flights import Flight
from xllm.engine.scheduler.order import Order
from xllm.engine.scheduler.planning import Planner
from xllm.errors import CapacityError, ErrorInfo, RequestError
from xllm.prefix import root_digest
from xllm.types import EngineSnapshot, FinishReason, RequestSpec
from xllm.wire.messages import Frame


class Scheduler:
    """Owns every request of one engine. Called by the step thread only.

    A request is known by its owner, the session it came from, and its id: what one front sends can neither
    clash with nor end what another one sent.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        memory: PageManager,
        order: Order,
        *,
        numerics_class: str,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._config = config
        self._numerics_class = numerics_class
        self._max_model_len = max_model_len
        self._books = Books(memory, order)
        self._deadlines = Deadlines()
        eos = frozenset(eos_token_ids)
        self._planner = Planner(config, self._books, self._deadlines, max_model_len=max_model_len, eos=eos)
        self._absorber = Absorber(self._books, max_model_len=max_model_len, eos=eos)
        self._next_arrival = 0

    # -- intake -------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, now_s: float, owner: int = 0) -> None:
        """Accept a validated request, or raise; a refused request leaves no trace."""
        books = self._books
        prompt = spec.prompt_token_ids
        if (owner, spec.request_id) in books.requests:
            raise RequestError("request id is already in use", code="duplicate_request")
        limit = self._config.max_num_seqs + self._config.max_num_queued_reqs
        if len(books.requests) >= limit:
            raise CapacityError("the engine's queue is full", retry_after_s=1.0)
        max_tokens = spec.params.max_tokens or 1
        most = min(len(prompt) + max_tokens, self._max_model_len)
        if not books.memory.fits(most, self._planner.max_rows):
            raise RequestError(
                f"the request may need {most} tokens of KV memory, more than this engine has; "
                "lower max_tokens or shorten the prompt",
                code="context_length_exceeded",
            )
        root = root_digest(self._numerics_class, spec.adapter, spec.cache_salt)
        request = Request(
            spec=spec, arrival=self._next_arrival, arrived_s=now_s, root=root, prompt=prompt, owner=owner
        )
        self._next_arrival += 1
        books.counters.num_accepted += 1
        books.requests[request.key] = request
        self._deadlines.add(request, len(books.requests))
        for choice, draws, emitted in _initial_choices(spec):
            books.add(request, choice, draws, (*prompt, *emitted))

    def abort(self, request_id: str, owner: int = 0) -> bool:
        """End the request with finish_reason abort; False if it is not (or no longer) here."""
        request = self._books.requests.get((owner, request_id))
        if request is None:
            return False
        self._books.end_request(request, FinishReason.ABORT, None)
        return True

    def abort_all(self, owner: int | None = None) -> int:
        """Abort every request, or every one of an owner; how many there were."""
        requests = [r for r in self._books.requests.values() if owner is None or r.owner == owner]
        for request in requests:
            self._books.end_request(request, FinishReason.ABORT, None)
        return len(requests)

    def fail(self, request_id: str, error: ErrorInfo, owner: int = 0) -> None:
        """End the request with an error frame."""
        request = self._books.requests.get((owner, request_id))
        if request is not None:
            self._books.end_request(request, FinishReason.ERROR, error)

    def committed(self, request_id: str, choice: int, num_tokens: int, owner: int = 0) -> None:
        """The front has `num_tokens` output tokens of the choice in its log."""
        request = self._books.requests.get((owner, request_id))
        if request is None:
            return
        for seq in request.sequences:
            if seq.choice == choice:
                seq.num_committed = max(seq.num_committed, min(num_tokens, seq.num_output))

    # -- steps --------------------------------------------------------------------------------

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when nothing can run now.

        Behind a step that is not absorbed yet, None may also mean that what comes next has to be decided with
        nothing under way. Plans are absorbed in the order in which they were made.
        """
        return self._planner.plan(now_s)

    def absorb(self, plan: StepPlan, result: StepResult) -> None:
        """Advance every planned sequence; output and terminal events become frames."""
        self._absorber.absorb(plan, result)

    # -- hand-over ------------------------------------------------------------------------------

    def find(self, request_id: str, owner: int) -> Request | None:
        return self._books.requests.get((owner, request_id))

    def hold(self, request: Request, held: bool = True) -> None:
        """Plan none of its sequences, or plan them again."""
        for seq in request.sequences:
            seq.held = held

    def claim(self, request: Request, manifest: Manifest, slots: Slots) -> int:
        """Let the sequences go on from KV that has arrived in `slots`; the rows that need not be computed."""
        num_rows = claim_pages(self._books.memory, request, manifest, slots)
        for seq in request.sequences:
            self._books.load.count(seq)
        return num_rows

    def take_copies(self) -> StepPlan | None:
        """Page copies that are due: before the pages at either end change hands otherwise than by a plan."""
        books = self._books
        if not books.copies:
            return None
        copies, books.copies = tuple(books.copies), []
        return StepPlan(step=self._planner.num_steps, sequences=(), copies=copies)

    @property
    def num_running(self) -> int:
        return len(self._books.running)

    # -- views --------------------------------------------------------------------------------

    def take_frames(self) -> tuple[Frame, ...]:
        """Output since the last call, in order; of all owners."""
        return tuple(frame for frames in self._books.frames.take().values() for frame in frames)

    def take_outputs(self) -> dict[int, list[Frame]]:
        """The same by owner."""
        return self._books.frames.take()

    @property
    def has_requests(self) -> bool:
        return bool(self._books.requests)

    def has_requests_of(self, owner: int) -> bool:
        return any(request.owner == owner for request in self._books.requests.values())

    @property
    def flights(self) -> Iterator[Flight]:
        """Plans that are not absorbed, the oldest first; to be looked at only."""
        return iter(self._books.flights)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that live; to be looked at only."""
        return (*self._books.waiting, *self._books.running)

    def origin_of(self, seq_id: int) -> tuple[str, int] | None:
        """(request id, choice) of a live sequence."""
        request = self._books.owner.get(seq_id)
        if request is None:
            return None
        return request.spec.request_id, next(s.choice for s in request.sequences if s.seq_id == seq_id)

    def preempt_all(self) -> int:
        """Send every running sequence back to the queue (tests, pause); how many there were."""
        victims = list(self._books.running)
        for seq in victims:
            self._books.preempt(seq)
        return len(victims)

    def snapshot(self) -> EngineSnapshot:
        books = self._books
        return books.counters.snapshot(
            step=self._planner.num_steps,
            num_running=len(books.running),
            num_waiting=len(books.waiting),
            num_requests=len(books.requests),
            pages=books.memory.counts(),
            load=books.load,
        )


def _initial_choices(spec: RequestSpec) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(choice, draws, emitted) of the sequences a request starts with.

    A fresh request starts as one sequence that forks at its first draw; a resumed one, whose
    choices already differ, starts with one for each choice that is still open.
    """
    if not any(spec.emitted) and not spec.ended:
        return [(0, tuple(range(spec.params.n)), ())]
    emitted = (*spec.emitted, *((),) * (spec.params.n - len(spec.emitted)))
    return [(i, (i,), emitted[i]) for i in range(spec.params.n) if i not in spec.ended]
