"""From shaped logits to tokens: temperature, filters, noise, argmax (steps 7 to 11 of the sampler's ADR).

`RowDrawer` is the seam for faster ones; `NumpyDrawer` is the definition in code that they must equal, token
for token. What must not live here: bias, penalties, logprobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from xllm.engine.plan import SampleOp
from xllm.engine.sampling.arrays import F32, U32
from xllm.engine.sampling.candidates import Candidates, candidates
from xllm.engine.sampling.exactmath import MAX_NOISE, MIN_NOISE, gumbel, noise_floor
from xllm.engine.sampling.philox import token_words, vocabulary_words
from xllm.errors import InternalError, RequestError, XllmError

GREEDY_BELOW = 1e-5
"""Temperatures below this mean argmax: dividing by them would overflow and draw the same token."""

_HOPELESS = np.float32(MAX_NOISE - MIN_NOISE + 0.1)
_FEW = 128
"""Up to so many candidates their noise is computed without first discarding the hopeless."""


class SampleRow(NamedTuple):
    """Draw `op` from row `logit_row` of a step's logits.

    `allowed` is a mask that came late, as a grammar's does: token i may be drawn if bit i % 32 of word
    i // 32 is set. It stands after bias and processors like every mask; penalties cannot undo it.
    """

    logit_row: int
    op: SampleOp
    allowed: U32 | None = None


Drawn = tuple[int, ...] | XllmError
"""A token for each of the op's choices, or what ended this row."""


class RowDrawer(Protocol):
    def draw(self, logits: F32, rows: Sequence[SampleRow], shaped: Mapping[int, F32]) -> list[Drawn]:
        """One outcome a row. `logits` (R, V) is float32, each row contiguous, and is left unchanged.

        `shaped[i]` stands for the logits of rows[i] where bias, processors, masks or penalties applied.
        A row without a finite maximum or with NaN, or whose mask leaves nothing, is an error of that row.
        """


class NumpyDrawer:
    """Row by row in numpy: the reference, and what serves where no native kernels are built."""

    def draw(self, logits: F32, rows: Sequence[SampleRow], shaped: Mapping[int, F32]) -> list[Drawn]:
        return [self._draw(shaped.get(i, logits[row.logit_row]), row) for i, row in enumerate(rows)]

    def _draw(self, x: F32, row: SampleRow) -> Drawn:
        try:
            check_finite(x, "logits")
            if row.allowed is not None:
                x = _masked(x, row.allowed)
            return _draw(x, row.op)
        except XllmError as error:
            return error


def check_finite(row: F32, what: str) -> None:
    """The maximum is enough: NaN spreads to it, and a row without a finite one has no distribution."""
    if not np.isfinite(row.max()):
        raise not_finite(what)


def not_finite(what: str) -> InternalError:
    return InternalError(f"{what} must have a finite maximum and no NaN")


def no_token_allowed() -> RequestError:
    return RequestError(
        "No token may be generated here: the request's constraints exclude all of them.",
        code="no_token_allowed",
    )


def _masked(x: F32, allowed: U32) -> F32:
    bits = np.unpackbits(allowed.astype("<u4", copy=False).view(np.uint8), bitorder="little", count=x.size)
    masked: F32 = np.where(bits, x, np.float32(-np.inf))
    if masked.max() == -np.inf:
        raise no_token_allowed()
    return masked


def _draw(x: F32, op: SampleOp) -> tuple[int, ...]:
    params = op.params
    if params.temperature < GREEDY_BELOW:
        return (int(x.argmax()),) * len(op.choices)
    if params.temperature != 1.0:
        with np.errstate(over="ignore"):
            x = x / np.float32(params.temperature)
        check_finite(x, OVERFLOWN)
    kept = _hopeful(candidates(x, params))
    return tuple(draw_one(kept, op.seed, choice, op.offset) for choice in op.choices)


OVERFLOWN = "logits divided by the temperature"


def _hopeful(kept: Candidates) -> Candidates:
    """Without tokens so far below the best that no noise could lift them past it; ids ascend.

    A whole row stays whole while most of it is hopeful: its words cost less than a subset's.
    """
    near = np.flatnonzero(kept.logits >= kept.logits.max() - _HOPELESS)
    if kept.ids is None:
        if near.size * 4 > kept.logits.size:
            return kept
        return Candidates(kept.logits[near], near)
    ids = kept.ids[near]
    order = np.argsort(ids)
    return Candidates(kept.logits[near][order], ids[order])


def draw_one(kept: Candidates, seed: int, choice: int, offset: int) -> int:
    """argmax of logit + noise over candidates in ascending order of id; ties to the lowest id."""
    logits, ids = kept.logits, kept.ids
    if logits.size == 1:
        return 0 if ids is None else int(ids[0])
    if ids is None:
        words = vocabulary_words(seed, choice, offset, logits.size)
    else:
        words = token_words(seed, choice, offset, ids)
    if logits.size > _FEW:
        best = int(logits.argmax())
        # A winner beats the likeliest token's score: its noise −ln(−ln u) is at least floor + gap, and as
        # −ln u > 1 − u, its 1 − u is below exp(−gap − floor). The word's complement is below
        # (1 − u) · 2**32; 0.1 % covers what float32 may err on a gap of at most 27.
        # In place: fresh arrays of this size cost more in page faults than the arithmetic.
        ceiling = logits - logits[best]
        ceiling -= np.float32(noise_floor(int(words[best])))
        np.exp(ceiling, out=ceiling)
        ceiling *= np.float32(1.001 * 2.0**32)
        alive = np.flatnonzero((~words).astype(np.float32) <= ceiling)
        logits, words = logits[alive], words[alive]
        ids = alive if ids is None else ids[alive]
    winner = int((logits + gumbel(words)).argmax())
    return winner if ids is None else int(ids[winner])
