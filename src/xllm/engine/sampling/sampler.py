"""Draws tokens: the whole order of operations of docs/design/0002-sampler.md on one screen.

    logits → logit_bias → processors → masks → penalties → [argmax at temperature 0]
           → ÷ temperature → top_k → top_p → min_p → argmax of logits + noise

Stateless between calls but for caches that change no result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.engine.plan import ChoiceTokens, SampledToken, SampleOp
from xllm.engine.sampling.arrays import F32
from xllm.engine.sampling.candidates import Candidates, candidates
from xllm.engine.sampling.constraints import Constraints
from xllm.engine.sampling.exactmath import MAX_NOISE, MIN_NOISE, gumbel, noise_floor
from xllm.engine.sampling.logprobs import RowLogprobs
from xllm.engine.sampling.philox import token_words, vocabulary_words
from xllm.engine.sampling.processors import LogitsProcessor
from xllm.errors import InternalError, RequestError, XllmError
from xllm.types import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this mean argmax: dividing by them would overflow and draw the same token."""

_HOPELESS = np.float32(MAX_NOISE - MIN_NOISE + 0.1)
_FEW = 128
"""Up to so many candidates their noise is computed without first discarding the hopeless."""
_MAX_CACHED = 1024


class Sampler:
    """One per engine. `processors` run in the given order on every row."""

    def __init__(self, processors: Sequence[LogitsProcessor] = ()) -> None:
        self._processors = tuple(processors)
        self._constraints: dict[int, Constraints] = {}

    def sample(self, logits: F32, op: SampleOp) -> tuple[ChoiceTokens, ...]:
        """One token for each entry of `op.choices` from one row (V,) of float32 logits, left unchanged.

        Raises RequestError(code="no_token_allowed") if the masks leave nothing, InternalError for
        NaN or infinite logits. Either concerns this request only.
        """
        row = np.ascontiguousarray(logits, dtype=np.float32)
        _check_finite(row, "logits")
        shaped = self._shape(row, op)
        tokens = _draw(shaped, op)
        if op.params.logprobs is None:
            return tuple(ChoiceTokens(c, (SampledToken(t),)) for c, t in zip(op.choices, tokens, strict=True))
        table = RowLogprobs(row, op.params.logprobs)
        return tuple(
            ChoiceTokens(c, (SampledToken(t, table.of(t)),)) for c, t in zip(op.choices, tokens, strict=True)
        )

    def prompt_logprobs(self, logits: F32, targets: tuple[int, ...], k: int) -> tuple[TokenLogprobs, ...]:
        """Row i of `logits` (R, V) scores targets[i], with the k most likely tokens; R ≥ len(targets)."""
        if len(targets) > len(logits):
            raise InternalError("prompt_logprobs: fewer logit rows than targets")
        scored = []
        for target, values in zip(targets, logits, strict=False):
            row = np.ascontiguousarray(values, dtype=np.float32)
            _check_finite(row, "logits")
            scored.append(RowLogprobs(row, k).of(target))
        return tuple(scored)

    def _shape(self, row: F32, op: SampleOp) -> F32:
        """The row after bias, processors, masks and penalties; `row` itself if nothing applies."""
        constraints = self._constraints_of(op.params, row.size)
        if not (self._processors or constraints.touches(op)):
            return row
        x = row.copy()
        constraints.add_bias(x)
        for processor in self._processors:
            _process(processor, x, op)
        constraints.mask(x, op)
        constraints.penalise(x, op)
        if x.max() == -np.inf:
            raise RequestError(
                "No token may be generated here: the request's constraints exclude all of them.",
                code="no_token_allowed",
            )
        return x

    def _constraints_of(self, params: SamplingParams, width: int) -> Constraints:
        """Cached by identity; the entry holds `params`, so its id cannot be taken by another object."""
        found = self._constraints.get(id(params))
        if found is None or found.width != width:
            if len(self._constraints) >= _MAX_CACHED:
                self._constraints.pop(next(iter(self._constraints)))
            found = self._constraints[id(params)] = Constraints(params, width)
        return found


def _draw(x: F32, op: SampleOp) -> tuple[int, ...]:
    params = op.params
    if params.temperature < GREEDY_BELOW:
        return (int(x.argmax()),) * len(op.choices)
    if params.temperature != 1.0:
        with np.errstate(over="ignore"):
            x = x / np.float32(params.temperature)
        _check_finite(x, "logits divided by the temperature")
    kept = _hopeful(candidates(x, params))
    return tuple(draw_one(kept, op.seed, choice, op.offset) for choice in op.choices)


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


def _check_finite(row: F32, what: str) -> None:
    """The maximum is enough: NaN spreads to it, and a row without a finite one has no distribution."""
    if not np.isfinite(row.max()):
        raise InternalError(f"{what} must have a finite maximum and no NaN")
