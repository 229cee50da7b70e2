"""Draws tokens: the whole order of operations of docs/design/0002-sampler.md on one screen.

    logits → logit_bias → processors → masks → penalties → [argmax at temperature 0]
           → ÷ temperature → top_k → top_p → min_p → argmax of logits + noise

Up to the penalties it happens here, on the rows that ask for it; the rest is a `RowDrawer`'s, for all rows
of a step at once. Stateless between calls but for caches that change no result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from xllm.engine.plan import ChoiceTokens, SampledToken, SampleOp
from xllm.engine.sampling.arrays import F32
from xllm.engine.sampling.constraints import Constraints
from xllm.engine.sampling.drawing import (
    Drawn,
    NumpyDrawer,
    RowDrawer,
    SampleRow,
    check_finite,
    no_token_allowed,
)
from xllm.engine.sampling.logprobs import RowLogprobs
from xllm.engine.sampling.processors import LogitsProcessor
from xllm.errors import InternalError, XllmError
from xllm.types import SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)

_MAX_CACHED = 1024

Sampled = tuple[ChoiceTokens, ...] | XllmError
"""What a row became: a token for each choice, or what ended its request."""


class Sampler:
    """One per engine. `processors` run in the given order on every row."""

    def __init__(self, processors: Sequence[LogitsProcessor] = (), drawer: RowDrawer | None = None) -> None:
        self._processors = tuple(processors)
        self._drawer = drawer or NumpyDrawer()
        self._constraints: dict[int, Constraints] = {}

    def drawing_with(self, drawer: RowDrawer) -> Sampler:
        """The same sampler over another drawer; tokens are equal by contract."""
        return Sampler(self._processors, drawer)

    def sample(self, logits: F32, op: SampleOp) -> tuple[ChoiceTokens, ...]:
        """One token for each entry of `op.choices` from one row (V,) of logits, left unchanged.

        Raises RequestError(code="no_token_allowed") if the masks leave nothing, InternalError for
        NaN or infinite logits.
        """
        (sampled,) = self.sample_rows(logits[None], (SampleRow(0, op),))
        if isinstance(sampled, XllmError):
            raise sampled
        return sampled

    def sample_rows(self, logits: F32, rows: Sequence[SampleRow]) -> list[Sampled]:
        """`sample` for many rows of `logits` (R, V) at once; an error is the outcome of its row alone."""
        if logits.dtype != np.float32 or logits.strides[1] != logits.itemsize:
            logits = np.ascontiguousarray(logits, dtype=np.float32)
        shaped: dict[int, F32] = {}
        failed: dict[int, XllmError] = {}
        for i, row in enumerate(rows):
            try:
                constraints = self._constraints_of(row.op.params, logits.shape[1])
                if self._processors or constraints.touches(row.op):
                    shaped[i] = self._shape(logits[row.logit_row], row.op, constraints)
            except XllmError as error:
                failed[i] = error
            except Exception:
                log.exception("sampling of a row failed")
                failed[i] = InternalError("the engine failed to sample this request")
        drawn = self._drawer.draw(logits, rows, shaped)
        return [
            _sampled(logits, row, failed.get(i, tokens) if failed else tokens)
            for i, (row, tokens) in enumerate(zip(rows, drawn, strict=True))
        ]

    def plain_rows(self, rows: Sequence[SampleRow], width: int) -> list[SampleRow] | None:
        """The rows with all that they ask for as masks, so that a drawer alone can finish them.

        None where it takes more: processors, bias, penalties, bad words of several tokens, log-probabilities.
        """
        if self._processors:
            return None
        plain: list[SampleRow] = []
        try:
            for row in rows:
                constraints = self._constraints_of(row.op.params, width)
                if row.op.params.logprobs is not None or not constraints.are_masks or row.allowed is not None:
                    return None
                bits = constraints.bits(row.op)
                plain.append(row if bits is None else row._replace(allowed=bits))
        except XllmError:
            return None  # that row's error, and `sample_rows` tells it
        return plain

    def prompt_logprobs(self, logits: F32, targets: tuple[int, ...], k: int) -> tuple[TokenLogprobs, ...]:
        """Row i of `logits` (R, V) scores targets[i], with the k most likely tokens; R ≥ len(targets)."""
        if len(targets) > len(logits):
            raise InternalError("prompt_logprobs: fewer logit rows than targets")
        scored = []
        for target, values in zip(targets, logits, strict=False):
            row = np.ascontiguousarray(values, dtype=np.float32)
            check_finite(row, "logits")
            scored.append(RowLogprobs(row, k).of(target))
        return tuple(scored)

    def _shape(self, row: F32, op: SampleOp, constraints: Constraints) -> F32:
        """A copy of the row after bias, processors, masks and penalties."""
        check_finite(row, "logits")
        x = row.copy()
        constraints.add_bias(x)
        for processor in self._processors:
            _process(processor, x, op)
        constraints.mask(x, op)
        constraints.penalise(x, op)
        if x.max() == -np.inf:
            raise no_token_allowed()
        return x

    def _constraints_of(self, params: SamplingParams, width: int) -> Constraints:
        """Cached by identity; the entry holds `params`, so its id cannot be taken by another object."""
        found = self._constraints.get(id(params))
        if found is None or found.width != width:
            if len(self._constraints) >= _MAX_CACHED:
                self._constraints.pop(next(iter(self._constraints)))
            found = self._constraints[id(params)] = Constraints(params, width)
        return found


def plainly(op: SampleOp, drawn: Drawn) -> Sampled:
    """What became of a row that asks for no log-probabilities."""
    if isinstance(drawn, XllmError):
        return drawn
    return tuple([ChoiceTokens(c, (SampledToken(t),)) for c, t in zip(op.choices, drawn, strict=True)])


def _sampled(logits: F32, row: SampleRow, drawn: Drawn) -> Sampled:
    op = row.op
    if isinstance(drawn, XllmError) or op.params.logprobs is None:
        return plainly(op, drawn)
    table = RowLogprobs(logits[row.logit_row], op.params.logprobs)
    return tuple(
        [ChoiceTokens(c, (SampledToken(t, table.of(t)),)) for c, t in zip(op.choices, drawn, strict=True)]
    )


def _process(processor: LogitsProcessor, x: F32, op: SampleOp) -> None:
    try:
        processor(x, op)
    except XllmError:
        raise
    except Exception as exc:
        raise InternalError(f"logits processor {processor.name!r} failed") from exc
    top = x.max()
    if np.isnan(top) or top == np.inf:
        raise InternalError(f"logits processor {processor.name!r} left NaN or +inf")
