"""Log-probabilities of the raw distribution: untouched logits, no temperature, no masks.

A row's numbers depend on that row only: the normaliser is an integer sum (`exactmath`), so there is
no order of reduction that a batch could change.
"""

from __future__ import annotations

import numpy as np

from xllm.engine.sampling.arrays import F32
from xllm.engine.sampling.candidates import top_ids
from xllm.engine.sampling.exactmath import log_sum_exp
from xllm.types import Logprob, TokenLogprobs


class RowLogprobs:
    """Log-softmax of one row (V,) with a finite maximum; the normaliser and top list are made once."""

    def __init__(self, row: F32, num_top: int) -> None:
        self._row = row
        self._log_total = log_sum_exp(row, row.max())
        # Equal logits share a rank, as `Logprob.rank` counts only strictly greater ones.
        self._top = tuple(self._entry(int(i)) for i in top_ids(row, num_top)) if num_top else ()

    def of(self, token_id: int) -> TokenLogprobs:
        return TokenLogprobs(self._entry(token_id), self._top)

    def _entry(self, token_id: int) -> Logprob:
        value = self._row[token_id]
        rank = 1 + int(np.count_nonzero(self._row > value))
        return Logprob(token_id, float(value) - self._log_total, rank)
