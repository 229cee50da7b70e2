"""Which tokens may be drawn: top_k, then top_p, then min_p, each exact and with ties to the lowest id.

Order of tokens everywhere here: larger logit first, then smaller id. Works on tempered logits; no
randomness. A token outside the candidates keeps its noise unused, so leaving it out changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from xllm.engine.sampling.arrays import F32, I64
from xllm.engine.sampling.exactmath import WEIGHT_ONE, weights
from xllm.types import SamplingParams

_SLACK = 1e-4
"""Far more than float32 exp and sum can err; brackets that are too wide cost time, never exactness."""
_HEADS = (6.0, 12.0, 20.0, math.inf)
"""How far below the maximum the sorted head reaches, tried in order until it holds the nucleus."""

_SMALL = 1024
"""Up to so many logits a stable float sort is the fastest."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn. `ids` is None when that is all of them; else `logits[i]` is of ids[i]."""

    logits: F32
    ids: I64 | None = None


def top_ids(logits: F32, k: int) -> I64:
    """The k first tokens (all if there are fewer), in order. O(V) plus the sort of k."""
    width = logits.size
    if k >= width:
        ids = np.arange(width)
    else:
        threshold = np.partition(logits, width - k)[width - k]
        ids = np.flatnonzero(logits >= threshold)
    return ids[_order(logits[ids])][:k]


def candidates(logits: F32, params: SamplingParams) -> Candidates:
    """Apply the three filters of `params` to one row (V,) whose maximum is finite."""
    kept = Candidates(logits)
    if 0 < params.top_k < logits.size:
        ids = top_ids(logits, params.top_k)
        kept = Candidates(logits[ids], ids)
    if params.top_p < 1.0:
        kept = _top_p_sorted(kept, params.top_p) if kept.ids is not None else _top_p(logits, params.top_p)
    if params.min_p > 0.0:
        kept = _min_p(kept, params.min_p)
    return kept


def _order(logits: F32) -> I64:
    """Permutation to larger-first; equal logits keep their (ascending id) order."""
    if logits.size <= _SMALL:
        return np.argsort(-logits, kind="stable")
    # (logit, position) packed into one integer: numpy sorts integers several times faster than it
    # sorts floats stably. The float's bits, made monotone, are the high half; + 0 makes −0 equal 0.
    bits = (-logits + np.float32(0)).view(np.uint32)
    flip = np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys = (bits ^ flip).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(logits.size, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _nucleus_len(before: I64, total: float, top_p: float) -> int:
    """Tokens whose predecessors' weight is below top_p of the total; `before` ascends from 0."""
    return int(np.searchsorted(before.astype(np.float64), top_p * total, side="left"))


def _top_p_sorted(kept: Candidates, top_p: float) -> Candidates:
    """Nucleus of candidates that are already in order; the total is theirs."""
    weight = weights(kept.logits, kept.logits[0])
    before = np.cumsum(weight) - weight
    n = _nucleus_len(before, float(int(weight.sum())), top_p)
    return Candidates(kept.logits[:n], None if kept.ids is None else kept.ids[:n])


def _top_p(logits: F32, top_p: float) -> Candidates:
    """Nucleus of a whole row, without the exact total where a bracket of it decides the same."""
    top = logits.max()
    about = logits - top
    np.exp(about, out=about)
    total = float(about.sum(dtype=np.float64)) * WEIGHT_ONE
    low, high = total * (1 - _SLACK), total * (1 + _SLACK)
    for depth in _HEADS:
        ids = np.flatnonzero(logits >= np.float32(float(top) - depth))
        if float(about[ids].sum(dtype=np.float64)) * WEIGHT_ONE > top_p * high * (1 + _SLACK):
            break
    ids = ids[_order(logits[ids])]
    head = logits[ids]
    weight = weights(head, top)
    before = np.cumsum(weight) - weight
    n = _nucleus_len(before, low, top_p)
    if n != _nucleus_len(before, high, top_p):
        n = _nucleus_len(before, float(int(weights(logits, top).sum())), top_p)
    return Candidates(head[:n], ids[:n])


def _min_p(kept: Candidates, min_p: float) -> Candidates:
    """Tokens at least min_p times as likely as the likeliest. Compared as weights: no logarithm decides."""
    top = kept.logits.max()
    near = np.flatnonzero(kept.logits >= np.float32(float(top) + math.log(min_p) - 0.01))
    near = near[weights(kept.logits[near], top) >= min_p * WEIGHT_ONE]
    return Candidates(kept.logits[near], near if kept.ids is None else kept.ids[near])
