"""The scheduler: plan one step, absorb its result. One rule for everything: catch up.

Chunked prefill, prefix hits, resume and preemption are all "behind by n tokens". Pure policy over
its own state and the page manager: no torch, no clock reading, no I/O. Charter: what a step *does*
belongs to the runner, what a page *is* to the platform, what is *sent* to `outputs`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from operator import attrgetter

from xllm.config import SchedulerConfig
from xllm.engine.kvtransfer.base import Manifest, Slots
from xllm.engine.memory.manager import PageManager, PageTable
from xllm.engine.plan import PageCopy, SampleOp, SequencePlan, StepPlan, StepResult
from xllm.engine.request import Request, Sequence, SequenceState
from xllm.engine.sampling import needs_history
from xllm.engine.scheduler.absorb import apply_result
from xllm.engine.scheduler.claim import claim_pages
from xllm.engine.scheduler.counters import Counters
from xllm.engine.scheduler.deadlines import DEADLINE_PASSED, Deadlines
from xllm.engine.scheduler.load import Load
from xllm.engine.scheduler.order import Order
from xllm.engine.scheduler.outputs import FrameBuilder
from xllm.errors import CapacityError, ErrorInfo, InternalError, RequestError
from xllm.prefix import root_digest
from xllm.types import PAGE_SIZE, EngineSnapshot, FinishReason, RequestSpec
from xllm.wire.messages import Frame


class Scheduler:
    """Owns every request of one engine. Called by the step thread only.

    A request is known by its owner, the session it came from, and its id: what one front sends can neither
    clash with nor end what another one sent.

    Invariants: a sequence is in exactly one of `_waiting`, `_running`, ended; both lists are sorted
    by rank; every accepted request yields one frame with `last`.

    Why it always gets on: pages go from later to earlier ranks, or from those that wait for a reader, never
    the other way. So the first-ranked of the running ones is never robbed and advances until it ends; with
    none running, the first-ranked waiting one may take every page there is, and `submit` saw that it fits.
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
        self._memory = memory
        self._order = order
        self._numerics_class = numerics_class
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        # Without chunking a whole prompt is one chunk, so the budget must hold the longest one.
        self._max_rows = config.max_num_batched_tokens
        if not config.enable_chunked_prefill:
            self._max_rows = max(self._max_rows, max_model_len)
        self._requests: dict[tuple[int, str], Request] = {}
        self._owner: dict[int, Request] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._planned: dict[int, Sequence] = {}
        self._copies: list[PageCopy] = []
        self._frames = FrameBuilder()
        self._deadlines = Deadlines()
        self._next_seq_id = 0
        self._next_arrival = 0
        self._step = 0
        self._counters = Counters()
        self._load = Load()
        self._planned_s = 0.0
        self._absorbed_s = 0.0

    # -- intake -------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, now_s: float, owner: int = 0) -> None:
        """Accept a validated request, or raise; a refused request leaves no trace."""
        prompt = spec.prompt_token_ids
        if (owner, spec.request_id) in self._requests:
            raise RequestError("request id is already in use", code="duplicate_request")
        limit = self._config.max_num_seqs + self._config.max_num_queued_reqs
        if len(self._requests) >= limit:
            raise CapacityError("the engine's queue is full", retry_after_s=1.0)
        max_tokens = spec.params.max_tokens or 1
        most = min(len(prompt) + max_tokens, self._max_model_len)
        if not self._memory.fits(most, self._max_rows):
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
        self._counters.num_accepted += 1
        self._requests[request.key] = request
        self._deadlines.add(request, len(self._requests))
        for choice, draws, emitted in _initial_choices(spec):
            self._add(request, choice, draws, (*prompt, *emitted))

    def abort(self, request_id: str, owner: int = 0) -> bool:
        """End the request with finish_reason abort; False if it is not (or no longer) here."""
        request = self._requests.get((owner, request_id))
        if request is None:
            return False
        self._end_request(request, FinishReason.ABORT, None)
        return True

    def abort_all(self, owner: int | None = None) -> int:
        """Abort every request, or every one of an owner; how many there were."""
        requests = [r for r in self._requests.values() if owner is None or r.owner == owner]
        for request in requests:
            self._end_request(request, FinishReason.ABORT, None)
        return len(requests)

    def fail(self, request_id: str, error: ErrorInfo, owner: int = 0) -> None:
        """End the request with an error frame."""
        request = self._requests.get((owner, request_id))
        if request is not None:
            self._end_request(request, FinishReason.ERROR, error)

    def committed(self, request_id: str, choice: int, num_tokens: int, owner: int = 0) -> None:
        """The front has `num_tokens` output tokens of the choice in its log."""
        request = self._requests.get((owner, request_id))
        if request is None:
            return
        for seq in request.sequences:
            if seq.choice == choice:
                seq.num_committed = max(seq.num_committed, min(num_tokens, seq.num_output))

    # -- plan ---------------------------------------------------------------------------------

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when nothing can run now."""
        self._planned = {}
        self._planned_s = now_s
        for request in self._deadlines.passed(now_s):
            self._end_request(request, FinishReason.ERROR, DEADLINE_PASSED)
        budget = self._max_rows
        num_preemptions = self._counters.num_preemptions
        # Sequences with one row to go first: a long prompt must not delay running streams.
        ready = [s for s in self._running if not (s.held or s.out_of_credit)]
        late = [s for s in ready if len(s.tokens) - s.num_computed > 1]
        if late:
            ready = [s for s in ready if len(s.tokens) - s.num_computed <= 1] + late
        entries: list[SequencePlan] = []
        for seq in ready:
            budget -= self._schedule(seq, budget, entries)
        # Right after a preemption pages are short: admitting now would only preempt again. Unless nothing is
        # left to run: without a plan the step thread waits for news, and none need come.
        if self._counters.num_preemptions == num_preemptions or not self._planned:
            self._admit(budget, entries, now_s)
        # A later sequence may have preempted an earlier entry to get its pages, and one that was displaced
        # may have been admitted again at once: only its last entry is about the pages that it has.
        alive = tuple({e.seq_id: e for e in entries if e.seq_id in self._planned}.values())
        if not alive:
            return None
        self._step += 1
        copies, self._copies = tuple(self._copies), []
        return StepPlan(step=self._step, sequences=alive, copies=copies)

    def _schedule(self, seq: Sequence, budget: int, entries: list[SequencePlan]) -> int:
        """Plan rows of `seq` if budget and pages allow; the number of rows taken."""
        if seq.state is not SequenceState.RUNNING:
            return 0
        behind = seq.behind
        rows = behind if behind < budget else budget
        if rows <= 0 or (rows < behind and not self._config.enable_chunked_prefill):
            return 0
        while not self._memory.grow(_table(seq), seq.num_computed + rows):
            victim = self._victim(seq)
            if victim is None or victim is seq:
                self._preempt(seq)
                return 0
            self._preempt(victim)
        self._planned[seq.seq_id] = seq
        entries.append(self._entry(seq, rows))
        return rows

    def _admit(self, budget: int, entries: list[SequencePlan], now_s: float) -> None:
        while self._waiting and budget > 0:
            seq = next((s for s in self._waiting if not s.stalled), None)
            if seq is None:
                return
            request = self._owner[seq.seq_id]
            full = len(self._running) >= self._config.max_num_seqs
            if full and not (self._park() or self._displace(request)):
                return
            rows = self._start(seq, request, budget)
            if rows == 0:
                if not (self._reclaim(seq) or self._displace(request)):
                    return
                continue
            self._waiting.remove(seq)
            bisect.insort(self._running, seq, key=_rank)
            seq.state = SequenceState.RUNNING
            if request.num_cached is None:
                self._admitted(request, seq, now_s)
            self._planned[seq.seq_id] = seq
            entries.append(self._entry(seq, rows))
            budget -= rows

    def _admitted(self, request: Request, seq: Sequence, now_s: float) -> None:
        """Its first sequence has a seat."""
        request.admitted_s = now_s
        request.queue_ms = (now_s - request.arrived_s) * 1000
        request.num_cached = 0
        # What a transfer brought is no hit of the prefix cache: the client was told of those already.
        if not request.claimed:
            request.num_cached = min(seq.num_computed, seq.prompt_len)
            self._counters.prefix_queries += seq.prompt_len
            self._counters.prefix_hits += request.num_cached

    def _start(self, seq: Sequence, request: Request, budget: int) -> int:
        """Give a waiting sequence its first pages; 0 rows (and no pages kept) if it must wait."""
        fresh = seq.table is None
        if fresh:
            # The last token is always computed: its row yields the logits of the next draw.
            most = len(seq.tokens) - 1 if request.reads_cache else 0
            seq.table = self._memory.match(request.root, seq.tokens, most)
            seq.num_computed = seq.table.num_pages * PAGE_SIZE
            self._load.count(seq)
        rows = min(seq.behind, budget)
        whole = rows == seq.behind or self._config.enable_chunked_prefill
        # With company, start only what can be caught up without preempting it again at once.
        room = not self._running or self._memory.can_grow(_table(seq), len(seq.tokens))
        if whole and room and self._memory.grow(_table(seq), seq.num_computed + rows):
            return rows
        if fresh:
            self._drop_table(seq)
        return 0

    def _park(self) -> bool:
        """A running sequence that waits for its reader, or is held, gives up its seat and keeps its pages.

        Else slow readers, and choices that a stop string ended at the front, would keep others from
        running; with n choices on fewer seats a request would wait for itself for ever.
        """
        idle = [s for s in self._running if s.stalled]
        if not idle:
            return False
        seq = max(idle, key=_rank)
        self._running.remove(seq)
        seq.state = SequenceState.WAITING
        self._enqueue(seq)
        return True

    def _reclaim(self, seq: Sequence) -> bool:
        """Pages for `seq`, the first to be admitted, from one that cannot use its own before `seq` runs.

        That is who waits behind it (a choice just forked holds pages while it waits), else both would wait
        for ever; and, waiting or running, who waits for its reader or is held. They compute them again later.
        """
        holders = self._idle_holders(seq)
        holders += [s for s in self._running if s.stalled]
        if not holders:
            return False
        self._preempt(self._last(holders, seq))
        return True

    def _idle_holders(self, seq: Sequence) -> list[Sequence]:
        """Waiting sequences whose pages `seq` may take: it goes before them, or they wait for a reader."""
        return [s for s in self._waiting if s.table is not None and (s.rank > seq.rank or s.stalled)]

    def _displace(self, newcomer: Request) -> bool:
        """Preempt the last-ranked running sequence if the order lets `newcomer` do so."""
        if not self._running:
            return False
        worst = max(self._running, key=_rank)
        if not self._order.may_displace(newcomer.spec, self._owner[worst.seq_id].spec):
            return False
        self._preempt(worst)
        return True

    def _victim(self, seq: Sequence) -> Sequence | None:
        """Who gives pages to `seq`: waiting sequences that hold some, then the last-ranked running one."""
        pool = self._idle_holders(seq) or self._running
        return self._last(pool, seq) if pool else None

    def _last(self, pool: list[Sequence], seq: Sequence) -> Sequence:
        """The last-ranked one; if others behind `seq` do, not one whose pages are pinned for a transfer: that
        would give nothing at once."""
        free = [s for s in pool if s.rank > seq.rank and not self._owner[s.seq_id].moving]
        return max(free or pool, key=_rank)

    def _preempt(self, seq: Sequence) -> None:
        """Free the pages; the sequence is behind by everything again and waits in its old place."""
        self._drop_table(seq)
        self._planned.pop(seq.seq_id, None)
        request = self._owner[seq.seq_id]
        if request.wants_prompt_logprobs:
            request.prompt_logprobs.clear()
        if seq.state is SequenceState.RUNNING:
            self._counters.num_preemptions += 1
            request.num_preemptions += 1
            self._running.remove(seq)
            seq.state = SequenceState.WAITING
            self._enqueue(seq)

    def _entry(self, seq: Sequence, rows: int) -> SequencePlan:
        request = self._owner[seq.seq_id]
        start = seq.num_computed
        end = start + rows
        draws = end == len(seq.tokens)
        first_logit_row = rows - 1 if draws else rows
        num_top: int | None = None
        targets: tuple[int, ...] = ()
        if request.wants_prompt_logprobs and seq.choice == 0 and start < seq.prompt_len:
            num_top = request.spec.params.prompt_logprobs
            first_logit_row = 0
            targets = request.prompt[start + 1 : end + 1]
        return SequencePlan(
            seq_id=seq.seq_id,
            start=start,
            tokens=tuple(seq.tokens[start:end]),
            pages=_table(seq).as_plan(),
            space=_table(seq).space,
            first_logit_row=first_logit_row,
            sample=self._sample_op(seq, request) if draws else None,
            prompt_logprobs=num_top,
            prompt_targets=targets,
        )

    def _sample_op(self, seq: Sequence, request: Request) -> SampleOp:
        params = request.spec.params
        history = needs_history(params)
        banned: tuple[int, ...] = ()
        if seq.num_output < params.min_tokens:
            banned = tuple(sorted(self._eos.union(params.stop_token_ids)))
        return SampleOp(
            params=params,
            seed=params.seed or 0,
            choices=seq.draws,
            offset=seq.num_output,
            banned=banned,
            prompt=tuple(seq.tokens[: seq.prompt_len]) if history else (),
            output=tuple(seq.tokens[seq.prompt_len :]) if history else (),
        )

    # -- hand-over ------------------------------------------------------------------------------

    def find(self, request_id: str, owner: int) -> Request | None:
        return self._requests.get((owner, request_id))

    def hold(self, request: Request, held: bool = True) -> None:
        """Plan none of its sequences, or plan them again."""
        for seq in request.sequences:
            seq.held = held

    def claim(self, request: Request, manifest: Manifest, slots: Slots) -> int:
        """Let the sequences go on from KV that has arrived in `slots`; the rows that need not be computed."""
        num_rows = claim_pages(self._memory, request, manifest, slots)
        for seq in request.sequences:
            self._load.count(seq)
        return num_rows

    def take_copies(self) -> StepPlan | None:
        """Page copies that are due: before the pages at either end change hands otherwise than by a plan."""
        if not self._copies:
            return None
        copies, self._copies = tuple(self._copies), []
        return StepPlan(step=self._step, sequences=(), copies=copies)

    @property
    def num_running(self) -> int:
        return len(self._running)

    # -- absorb -------------------------------------------------------------------------------

    def absorb(self, plan: StepPlan, result: StepResult) -> None:
        """Advance every planned sequence; output and terminal events become frames."""
        results = {r.seq_id: r for r in result.sequences}
        self._absorbed_s = self._planned_s + result.elapsed_ms / 1000
        for entry in plan.sequences:
            seq = self._planned.get(entry.seq_id)
            if seq is None or seq.state is not SequenceState.RUNNING:
                continue
            request = self._owner[seq.seq_id]
            outcome = results.get(entry.seq_id)
            if outcome is None:
                self._end_request(request, FinishReason.ERROR, _NO_RESULT)
            elif outcome.error is not None:
                self._end_request(request, FinishReason.ERROR, outcome.error)
            else:
                self._advance(seq, request, entry, apply_result(seq, request, entry, outcome))
        self._planned = {}

    def _advance(
        self, seq: Sequence, request: Request, entry: SequencePlan, drawn: dict[int, tuple[int, ...]]
    ) -> None:
        end = entry.start + len(entry.tokens)
        if entry.start < seq.prompt_len:
            self._counters.prompt_tokens += min(end, seq.prompt_len) - entry.start
        seq.num_computed = end
        self._memory.computed(_table(seq), seq.tokens, end)
        if entry.sample is None:
            self._load.count(seq)
            return
        if request.prefill_ms == 0.0:
            request.prefill_ms = (self._absorbed_s - request.admitted_s) * 1000
        members = [seq, *self._fork(seq, request, drawn)]
        for member in members:
            num_tokens = len(drawn[member.choice])
            self._counters.generation_tokens += num_tokens
            self._load.drew(member, num_tokens)
            self._check_end(member, request)
        if self._frames.output(request, members, drawn):
            self._forget(request)

    def _fork(self, seq: Sequence, request: Request, drawn: dict[int, tuple[int, ...]]) -> Iterable[Sequence]:
        """Give each choice beyond the first its own sequence over the same prompt pages; those sequences."""
        if len(seq.draws) == 1:
            seq.tokens.extend(drawn[seq.choice])
            return ()
        children: list[Sequence] = []
        for choice in seq.draws[1:]:
            tokens = (*seq.tokens[: seq.num_computed], *drawn[choice])
            child = self._add(request, choice, (choice,), tokens)
            children.append(child)
            forked = self._memory.fork(_table(seq), seq.num_computed)
            if forked is not None:
                child.table, copies = forked
                child.num_computed = seq.num_computed
                self._copies.extend(copies)
        seq.draws = (seq.choice,)
        seq.tokens.extend(drawn[seq.choice])
        return children

    def _check_end(self, seq: Sequence, request: Request) -> None:
        params = request.spec.params
        last = seq.tokens[-1]
        if last in self._eos and not params.ignore_eos:
            self._end_sequence(seq, FinishReason.STOP)
        elif last in params.stop_token_ids:
            seq.stop_token_id = last
            self._end_sequence(seq, FinishReason.STOP)
        elif seq.num_output >= (params.max_tokens or 1) or len(seq.tokens) >= self._max_model_len:
            self._end_sequence(seq, FinishReason.LENGTH)

    # -- endings ------------------------------------------------------------------------------

    def _end_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state is SequenceState.RUNNING:
            self._running.remove(seq)
        elif seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)
        self._drop_table(seq)
        self._load.drop(seq)
        self._planned.pop(seq.seq_id, None)
        seq.state = SequenceState.ENDED
        seq.finish_reason = reason
        self._owner.pop(seq.seq_id, None)

    def _end_request(self, request: Request, reason: FinishReason, error: ErrorInfo | None) -> None:
        for seq in request.sequences:
            if seq.state is not SequenceState.ENDED:
                self._end_sequence(seq, reason)
        self._frames.terminal(request, reason, error)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._counters.num_ended += 1
        request.ended = True
        del self._requests[request.key]

    # -- views --------------------------------------------------------------------------------

    def take_frames(self) -> tuple[Frame, ...]:
        """Output since the last call, in order; of all owners."""
        return tuple(frame for frames in self._frames.take().values() for frame in frames)

    def take_outputs(self) -> dict[int, list[Frame]]:
        """The same by owner."""
        return self._frames.take()

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def has_requests_of(self, owner: int) -> bool:
        return any(request.owner == owner for request in self._requests.values())

    def origin_of(self, seq_id: int) -> tuple[str, int] | None:
        """(request id, choice) of a live sequence."""
        request = self._owner.get(seq_id)
        if request is None:
            return None
        return request.spec.request_id, next(s.choice for s in request.sequences if s.seq_id == seq_id)

    def preempt_all(self) -> int:
        """Send every running sequence back to the queue (tests, pause); how many there were."""
        victims = list(self._running)
        for seq in victims:
            self._preempt(seq)
        return len(victims)

    def snapshot(self) -> EngineSnapshot:
        return self._counters.snapshot(
            step=self._step,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_requests=len(self._requests),
            pages=self._memory.counts(),
            load=self._load,
        )

    # -- small helpers ------------------------------------------------------------------------

    def _add(
        self, request: Request, choice: int, draws: tuple[int, ...], tokens: tuple[int, ...]
    ) -> Sequence:
        seq = Sequence(
            seq_id=self._next_seq_id,
            choice=choice,
            tokens=list(tokens),
            prompt_len=len(request.prompt),
            draws=draws,
            rank=(*self._order.key(request.spec, request.arrival), choice),
        )
        # What an earlier attempt emitted is in the front's log already.
        emitted = request.spec.emitted[choice] if choice < len(request.spec.emitted) else ()
        seq.num_committed = seq.num_streamed = len(emitted)
        self._next_seq_id += 1
        self._owner[seq.seq_id] = request
        request.sequences.append(seq)
        self._load.count(seq)
        self._enqueue(seq)
        return seq

    def _enqueue(self, seq: Sequence) -> None:
        bisect.insort(self._waiting, seq, key=_rank)

    def _drop_table(self, seq: Sequence) -> None:
        if seq.table is not None:
            self._memory.release(seq.table)
            seq.table = None
        seq.num_computed = 0
        self._load.count(seq)


_rank = attrgetter("rank")

_NO_RESULT = ErrorInfo(
    kind="InternalError", code="internal_error", message="the engine returned no result for the request"
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


def _table(seq: Sequence) -> PageTable:
    if seq.table is None:
        raise InternalError("a scheduled sequence has no page table")
    return seq.table
