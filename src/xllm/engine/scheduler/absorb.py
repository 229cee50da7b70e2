"""Absorbing a result: sequences advance, fork and end; drawn tokens and logprobs become frames.

Whether a token ends its sequence is seen here, one step late where the next one is under way already: that one
has a row for it then, which is thrown away at its own absorb and counted nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.engine.plan import SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.request import Request, Sequence, SequenceState
from xllm.engine.scheduler.books import Books
from xllm.engine.scheduler.entries import table_of
from xllm.engine.scheduler.flights import Flight
from xllm.errors import ErrorInfo, InternalError
from xllm.types import FinishReason


class Absorber:
    def __init__(self, books: Books, *, max_model_len: int, eos: frozenset[int]) -> None:
        self._books = books
        self._max_model_len = max_model_len
        self._eos = eos
        self._absorbed_s = 0.0

    def absorb(self, plan: StepPlan, result: StepResult) -> None:
        books = self._books
        flight = books.flights.end(plan)
        if result.dropped:
            # As if it had never been planned. Its copies are older than those that came due since.
            books.copies[:0] = plan.copies
            return
        self._absorbed_s = self._ended_s(flight, result)
        results = {r.seq_id: r for r in result.sequences}
        for entry in plan.sequences:
            seq = flight.sequences.get(entry.seq_id)
            if seq is None or seq.state is not SequenceState.RUNNING:
                continue
            request = books.owner[seq.seq_id]
            outcome = results.get(entry.seq_id)
            if outcome is None:
                books.end_request(request, FinishReason.ERROR, _NO_RESULT)
            elif outcome.error is not None:
                books.end_request(request, FinishReason.ERROR, outcome.error)
            else:
                self._advance(seq, request, entry, apply_result(request, entry, outcome))

    def _ended_s(self, flight: Flight, result: StepResult) -> float:
        if result.ended_s:
            return result.ended_s
        began_s = max(flight.planned_s, self._absorbed_s) if flight.is_ahead else flight.planned_s
        return began_s + result.elapsed_ms / 1000

    def _advance(
        self, seq: Sequence, request: Request, entry: SequencePlan, drawn: dict[int, tuple[int, ...]]
    ) -> None:
        books = self._books
        end = entry.start + len(entry.tokens)
        if entry.start < seq.prompt_len:
            books.counters.prompt_tokens += min(end, seq.prompt_len) - entry.start
        seq.num_computed = end
        # What the window leaves behind may be named in a plan that is under way, but no row of it sees that.
        books.memory.computed(table_of(seq), seq.tokens, end)
        if entry.sample is None:
            books.load.count(seq)
            return
        if request.prefill_ms == 0.0:
            request.prefill_ms = (self._absorbed_s - request.admitted_s) * 1000
        members = [seq, *self._fork(seq, request, drawn)]
        for member in members:
            num_tokens = len(drawn[member.choice])
            books.counters.generation_tokens += num_tokens
            books.load.drew(member, num_tokens)
            self._check_end(member, request)
        if books.frames.output(request, members, drawn):
            books.forget(request)

    def _fork(self, seq: Sequence, request: Request, drawn: dict[int, tuple[int, ...]]) -> Iterable[Sequence]:
        """Give each choice beyond the first its own sequence over the same prompt pages; those sequences."""
        if len(seq.draws) == 1:
            seq.tokens.extend(drawn[seq.choice])
            return ()
        books = self._books
        children: list[Sequence] = []
        for choice in seq.draws[1:]:
            tokens = (*seq.tokens[: seq.num_computed], *drawn[choice])
            child = books.add(request, choice, (choice,), tokens)
            children.append(child)
            forked = books.memory.fork(table_of(seq), seq.num_computed)
            if forked is not None:
                child.table, copies = forked
                child.num_computed = seq.num_computed
                books.copies.extend(copies)
        seq.draws = (seq.choice,)
        seq.tokens.extend(drawn[seq.choice])
        return children

    def _check_end(self, seq: Sequence, request: Request) -> None:
        params = request.spec.params
        last = seq.tokens[-1]
        if last in self._eos and not params.ignore_eos:
            self._books.end_sequence(seq, FinishReason.STOP)
        elif last in params.stop_token_ids:
            seq.stop_token_id = last
            self._books.end_sequence(seq, FinishReason.STOP)
        elif seq.num_output >= (params.max_tokens or 1) or len(seq.tokens) >= self._max_model_len:
            self._books.end_sequence(seq, FinishReason.LENGTH)


def apply_result(
    request: Request, entry: SequencePlan, outcome: SequenceResult
) -> dict[int, tuple[int, ...]]:
    """Keep prompt logprobs and token logprobs; the drawn token ids per choice.

    Raises InternalError when the runner drew for other choices than the plan asked for.
    """
    if outcome.prompt_logprobs:
        request.prompt_logprobs.extend(outcome.prompt_logprobs)
    drawn: dict[int, tuple[int, ...]] = {}
    for choice in outcome.choices:
        drawn[choice.choice] = tuple([t.token_id for t in choice.tokens])
        if request.spec.params.logprobs is not None:
            kept = request.token_logprobs.setdefault(choice.choice, [])
            kept.extend(t.logprobs for t in choice.tokens if t.logprobs is not None)
    asked = entry.sample.choices if entry.sample is not None else ()
    if tuple(drawn) != asked and set(drawn) != set(asked):
        raise InternalError("the runner drew for other choices than the plan asked for")
    return drawn


_NO_RESULT = ErrorInfo(
    kind="InternalError", code="internal_error", message="the engine returned no result for the request"
)
