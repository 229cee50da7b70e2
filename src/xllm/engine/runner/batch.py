"""From a step plan to the model's view of it: flat rows, attention plans, rows that yield logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xllm.engine.kernels.ops import Backend, Batch, KVSpan
from xllm.engine.plan import SequencePlan
from xllm.types import PAGE_SIZE, KVLayout

MAX_LOGIT_ROWS = 128
"""Rows of logits computed at once: with a vocabulary of 262,144 they take 128 MiB."""


@dataclass(frozen=True, slots=True)
class LogitPiece:
    """`count` consecutive logit rows of sequence `index`, from its `offset`-th one on."""

    index: int
    offset: int
    count: int


def build_batch(sequences: Sequence[SequencePlan], layout: KVLayout, num_heads: int, ops: Backend) -> Batch:
    """The sequences' rows one after the other, then padding up to the backend's row multiple.

    `logit_rows` lists the rows that yield logits in the same order, unpadded.
    """
    counts = [len(s.tokens) for s in sequences]
    num_rows = _round_up(sum(counts), ops.row_multiple)
    token_ids = np.zeros(num_rows, dtype=np.int64)
    positions = np.zeros(num_rows, dtype=np.int64)
    logit_rows: list[int] = []
    starts: list[int] = []
    row = 0
    for sequence, count in zip(sequences, counts, strict=True):
        token_ids[row : row + count] = sequence.tokens
        positions[row : row + count] = np.arange(sequence.start, sequence.start + count)
        logit_rows.extend(range(row + sequence.first_logit_row, row + count))
        starts.append(row)
        row += count
    plans = []
    for g, group in enumerate(layout.groups):
        spans = [
            KVSpan(row=row, num_rows=count, start=s.start, pages=s.pages[g])
            for row, count, s in zip(starts, counts, sequences, strict=True)
        ]
        plans.append(ops.attention_plan(group, num_heads, spans, num_rows))
    return Batch(
        token_ids=ops.indices(token_ids),
        positions=ops.indices(positions),
        logit_rows=ops.indices(np.array(logit_rows, dtype=np.int64)),
        attention=tuple(plans),
    )


def new_pages(sequences: Sequence[SequencePlan], group: int) -> list[int]:
    """Pages whose first slot is written in this step."""
    found: list[int] = []
    for s in sequences:
        first, end = -(-s.start // PAGE_SIZE), -(-(s.start + len(s.tokens)) // PAGE_SIZE)
        if first < end:
            found += s.pages[group][first:end]
    return found


def logit_slices(sequences: Sequence[SequencePlan]) -> Iterator[list[LogitPiece]]:
    """The logit rows in order, cut into slices of at most MAX_LOGIT_ROWS rows."""
    pieces: list[LogitPiece] = []
    room = MAX_LOGIT_ROWS
    for index, sequence in enumerate(sequences):
        offset, left = 0, len(sequence.tokens) - sequence.first_logit_row
        while left > 0:
            count = min(left, room)
            pieces.append(LogitPiece(index, offset, count))
            offset, left, room = offset + count, left - count, room - count
            if room == 0:
                yield pieces
                pieces, room = [], MAX_LOGIT_ROWS
    if pieces:
        yield pieces


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
