"""One sequence's part of a plan, as a value. Which rows, and of whom, is decided in `planning`.

Rows go on behind those that are computed or under way. A token that such a row draws is not known yet: it is
PENDING here, and counts wherever a position or an offset is meant.
"""

from __future__ import annotations

from xllm.engine.memory.manager import PageTable
from xllm.engine.plan import PENDING, SampleOp, SequencePlan
from xllm.engine.request import Request, Sequence
from xllm.engine.sampling import needs_history
from xllm.errors import InternalError


def table_of(seq: Sequence) -> PageTable:
    if seq.table is None:
        raise InternalError("a scheduled sequence has no page table")
    return seq.table


def make_entry(seq: Sequence, request: Request, rows: int, eos: frozenset[int]) -> SequencePlan:
    start = seq.num_computed + seq.in_flight
    end = start + rows
    draws = end == len(seq.tokens) + seq.drawing
    pending = end > len(seq.tokens)
    tokens = tuple(seq.tokens[start:end])
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
        tokens=(*tokens, PENDING) if pending else tokens,
        pages=table_of(seq).as_plan(),
        first_logit_row=first_logit_row,
        sample=_sample_op(seq, request, eos) if draws else None,
        prompt_logprobs=num_top,
        prompt_targets=targets,
        pending=pending,
    )


def _sample_op(seq: Sequence, request: Request, eos: frozenset[int]) -> SampleOp:
    params = request.spec.params
    history = needs_history(params)
    offset = seq.num_output + seq.drawing
    banned: tuple[int, ...] = ()
    if offset < params.min_tokens:
        banned = tuple(sorted(eos.union(params.stop_token_ids)))
    return SampleOp(
        params=params,
        seed=params.seed or 0,
        choices=seq.draws,
        offset=offset,
        banned=banned,
        prompt=tuple(seq.tokens[: seq.prompt_len]) if history else (),
        output=tuple(seq.tokens[seq.prompt_len :]) if history else (),
    )
