"""Which rows of which sequences make up the next step, and whose pages and seats they take for it.

One rule for everything: catch up. Chunked prefill, prefix hits, resume and preemption are all "behind by n
tokens". Behind a step that is under way only simple things are planned; whatever takes pages or seats from
somebody waits until that step is absorbed, when it is decided as if steps never overlapped.
"""

from __future__ import annotations

from xllm.config import SchedulerConfig
from xllm.engine.plan import SequencePlan, StepPlan
from xllm.engine.request import Request, Sequence, SequenceState
from xllm.engine.scheduler.books import Books, rank_of
from xllm.engine.scheduler.deadlines import DEADLINE_PASSED, Deadlines
from xllm.engine.scheduler.entries import make_entry, table_of
from xllm.types import PAGE_SIZE, FinishReason


class _NotAheadError(Exception):
    """The rest of this plan is for when nothing is under way."""


class Planner:
    """Why everybody always gets on: pages go from later to earlier ranks, or from those that wait for a reader,
    never the other way. So the first-ranked of the running ones is never robbed and advances until it ends; with
    none running, the first-ranked waiting one may take every page there is, and `submit` saw that it fits.
    A plan that would rob somebody is not made ahead, so the next one is made with nothing under way.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        books: Books,
        deadlines: Deadlines,
        *,
        max_model_len: int,
        eos: frozenset[int],
    ) -> None:
        self._config = config
        self._books = books
        self._memory = books.memory
        self._deadlines = deadlines
        self._max_model_len = max_model_len
        self._eos = eos
        # Without chunking a whole prompt is one chunk, so the budget must hold the longest one.
        self.max_rows = config.max_num_batched_tokens
        if not config.enable_chunked_prefill:
            self.max_rows = max(self.max_rows, max_model_len)
        self.num_steps = 0
        self._is_ahead = False
        # The entries so far. Who is preempted for the sake of another one leaves it.
        self._draft: dict[int, tuple[Sequence, SequencePlan]] = {}

    def plan(self, now_s: float) -> StepPlan | None:
        books = self._books
        for request in self._deadlines.passed(now_s):
            books.end_request(request, FinishReason.ERROR, DEADLINE_PASSED)
        self._is_ahead = len(books.flights) > 0
        self._draft = {}
        try:
            self._fill(self._step_budget(), now_s)
        except _NotAheadError:
            return None
        if not self._draft:
            return None
        self.num_steps += 1
        copies, books.copies = tuple(books.copies), []
        entries = tuple([entry for _, entry in self._draft.values()])
        plan = StepPlan(step=self.num_steps, sequences=entries, copies=copies)
        books.flights.begin(plan, {seq_id: seq for seq_id, (seq, _) in self._draft.items()}, now_s)
        return plan

    def _step_budget(self) -> int:
        """Rows of the step, at most. The one place where that is decided."""
        return self.max_rows

    def _fill(self, budget: int, now_s: float) -> None:
        counters = self._books.counters
        num_preemptions = counters.num_preemptions
        # Sequences with one row to go first: a long prompt must not delay running streams.
        ready = [s for s in self._books.running if not (s.held or s.out_of_credit)]
        late = [s for s in ready if len(s.tokens) + s.drawing - s.num_computed - s.in_flight > 1]
        if late:
            behind = set(map(id, late))
            ready = [s for s in ready if id(s) not in behind] + late
        for seq in ready:
            budget -= self._schedule(seq, budget)
        # Right after a preemption pages are short: admitting now would only preempt again. Unless nothing is
        # left to run: without a plan the step thread waits for news, and none need come.
        if counters.num_preemptions == num_preemptions or not self._draft:
            self._admit(budget, now_s)

    # -- running sequences ------------------------------------------------------------------------

    def _schedule(self, seq: Sequence, budget: int) -> int:
        """Plan rows of `seq` if budget and pages allow; the number of rows taken."""
        if seq.state is not SequenceState.RUNNING:
            return 0
        request = self._books.owner[seq.seq_id]
        if seq.in_flight and not self._may_follow(seq, request):
            return 0
        rows = min(seq.unplanned, budget)
        if rows <= 0 or (rows < seq.unplanned and not self._config.enable_chunked_prefill):
            return 0
        self._scores_alone(request)
        while not self._memory.grow(table_of(seq), seq.num_computed + seq.in_flight + rows):
            self._decide()
            victim = self._victim(seq)
            if victim is None or victim is seq:
                self._preempt(seq)
                return 0
            self._preempt(victim)
        self._draft[seq.seq_id] = seq, make_entry(seq, request, rows, self._eos)
        return rows

    def _may_follow(self, seq: Sequence, request: Request) -> bool:
        """Are there rows behind those under way, as far as can be known before these are absorbed?"""
        if not seq.drawing:
            return True
        if len(seq.draws) > 1:
            return False  # it forks, and which sequences there are then is known afterwards
        return (
            seq.num_output + seq.drawing < (request.spec.params.max_tokens or 1)
            and len(seq.tokens) + seq.drawing < self._max_model_len
        )

    def _scores_alone(self, request: Request) -> None:
        """Logprobs of a prompt's tokens are collected over its steps, one after the other."""
        if request.wants_prompt_logprobs:
            self._decide()

    def _victim(self, seq: Sequence) -> Sequence | None:
        """Who gives pages to `seq`: waiting sequences that hold some, then the last-ranked running one."""
        pool = self._idle_holders(seq) or self._books.running
        return self._last(pool, seq) if pool else None

    # -- waiting sequences ------------------------------------------------------------------------

    def _admit(self, budget: int, now_s: float) -> None:
        books = self._books
        while books.waiting and budget > 0:
            seq = next((s for s in books.waiting if not s.stalled), None)
            if seq is None:
                return
            request = books.owner[seq.seq_id]
            full = len(books.running) >= self._config.max_num_seqs
            if full and not (self._park() or self._displace(request)):
                return
            self._scores_alone(request)
            rows = self._start(seq, request, budget)
            if rows == 0:
                if not (self._reclaim(seq) or self._displace(request)):
                    return
                continue
            books.run(seq)
            if request.num_cached is None:
                self._admitted(request, seq, now_s)
            self._draft[seq.seq_id] = seq, make_entry(seq, request, rows, self._eos)
            budget -= rows

    def _start(self, seq: Sequence, request: Request, budget: int) -> int:
        """Give a waiting sequence its first pages; 0 rows (and no pages kept) if it must wait."""
        fresh = seq.table is None
        if fresh:
            # The last token is always computed: its row yields the logits of the next draw.
            most = len(seq.tokens) - 1 if request.reads_cache else 0
            seq.table = self._memory.match(request.root, seq.tokens, most)
            seq.num_computed = seq.table.num_pages * PAGE_SIZE
            self._books.load.count(seq)
        rows = min(seq.behind, budget)
        whole = rows == seq.behind or self._config.enable_chunked_prefill
        # With company, start only what can be caught up without preempting it again at once.
        room = not self._books.running or self._memory.can_grow(table_of(seq), len(seq.tokens))
        if whole and room and self._memory.grow(table_of(seq), seq.num_computed + rows):
            return rows
        if fresh:
            self._books.drop_pages(seq)
        return 0

    def _admitted(self, request: Request, seq: Sequence, now_s: float) -> None:
        """Its first sequence has a seat."""
        counters = self._books.counters
        request.admitted_s = now_s
        request.queue_ms = (now_s - request.arrived_s) * 1000
        request.num_cached = 0
        # What a transfer brought is no hit of the prefix cache: the client was told of those already.
        if not request.claimed:
            request.num_cached = min(seq.num_computed, seq.prompt_len)
            counters.prefix_queries += seq.prompt_len
            counters.prefix_hits += request.num_cached

    # -- room for others --------------------------------------------------------------------------

    def _decide(self) -> None:
        """Somebody is about to lose pages or a seat: not while rows are under way."""
        if self._is_ahead:
            raise _NotAheadError

    def _park(self) -> bool:
        """A running sequence that waits for its reader, or is held, gives up its seat and keeps its pages.

        Else slow readers, and choices that a stop string ended at the front, would keep others from
        running; with n choices on fewer seats a request would wait for itself for ever.
        """
        idle = [s for s in self._books.running if s.stalled]
        if not idle:
            return False
        self._decide()
        self._books.unseat(max(idle, key=rank_of))
        return True

    def _reclaim(self, seq: Sequence) -> bool:
        """Pages for `seq`, the first to be admitted, from one that cannot use its own before `seq` runs.

        That is who waits behind it (a choice just forked holds pages while it waits), else both would wait
        for ever; and, waiting or running, who waits for its reader or is held. They compute them again later.
        """
        holders = self._idle_holders(seq)
        holders += [s for s in self._books.running if s.stalled]
        if not holders:
            return False
        self._decide()
        self._preempt(self._last(holders, seq))
        return True

    def _idle_holders(self, seq: Sequence) -> list[Sequence]:
        """Waiting sequences whose pages `seq` may take: it goes before them, or they wait for a reader."""
        return [s for s in self._books.waiting if s.table is not None and (s.rank > seq.rank or s.stalled)]

    def _displace(self, newcomer: Request) -> bool:
        """Preempt the last-ranked running sequence if the order lets `newcomer` do so."""
        if not self._books.running:
            return False
        worst = max(self._books.running, key=rank_of)
        if not self._books.order.may_displace(newcomer.spec, self._books.owner[worst.seq_id].spec):
            return False
        self._decide()
        self._preempt(worst)
        return True

    def _last(self, pool: list[Sequence], seq: Sequence) -> Sequence:
        """The last-ranked one; if others behind `seq` do, not one whose pages are pinned for a transfer: that
        would give nothing at once."""
        free = [s for s in pool if s.rank > seq.rank and not self._books.owner[s.seq_id].moving]
        return max(free or pool, key=rank_of)

    def _preempt(self, seq: Sequence) -> None:
        self._draft.pop(seq.seq_id, None)
        self._books.preempt(seq)
