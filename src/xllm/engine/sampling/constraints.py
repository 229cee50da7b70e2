"""What a request adds to or takes from the raw logits: bias, masks and penalties, in place.

One `Constraints` per SamplingParams object holds its lists as arrays, so a step does not convert
them again. Masks come after everything that could raise a logit: what is masked stays masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from xllm.engine.plan import SampleOp
from xllm.engine.sampling.arrays import F32, I64, U32
from xllm.errors import RequestError
from xllm.types import SamplingParams

_MASKED = np.float32(-np.inf)


def needs_history(params: SamplingParams) -> bool:
    """True if `SampleOp.prompt` and `.output` must be filled: penalties, or bad words of several tokens."""
    return has_penalties(params) or any(len(word) > 1 for word in params.bad_words_token_ids)


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


class Constraints:
    """The constraints of one SamplingParams for logits of one width.

    Raises RequestError if a token id lies outside the logits; `limits` refuses that much earlier.
    """

    def __init__(self, params: SamplingParams, width: int) -> None:
        bias = params.logit_bias or {}
        words = params.bad_words_token_ids
        self.params = params
        self.width = width
        self._bias_ids = _ids("logit_bias", bias, width)
        self._bias = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else _ids("allowed_token_ids", allowed, width)
        self._bad_tokens = _ids("bad_words_token_ids", (w[0] for w in words if len(w) == 1), width)
        self._bad_sequences = tuple((w[:-1], w[-1]) for w in words if len(w) > 1)
        _ids("bad_words_token_ids", (last for _, last in self._bad_sequences), width)
        self._penalties = has_penalties(params)
        self._bits: U32 | None = None
        self._bits_banned: tuple[int, ...] = ()
        self._prompt: tuple[int, ...] | None = None
        self._prompt_ids = np.empty(0, dtype=np.int64)

    def touches(self, op: SampleOp) -> bool:
        """False if the logits may be used as they are."""
        p = self.params
        return bool(
            op.banned or p.logit_bias or p.bad_words_token_ids or self._allowed is not None or self._penalties
        )

    @property
    def are_masks(self) -> bool:
        """Whether `bits` says all of it: nothing here depends on a history or changes what is not masked."""
        return not (self._bias_ids.size or self._penalties or self._bad_sequences)

    def bits(self, op: SampleOp) -> U32 | None:
        """`mask` as `SampleRow.allowed`; None = all tokens may be drawn. Only where these `are_masks`."""
        if not self.touches(op):
            return None
        if self._bits is None or self._bits_banned != op.banned:
            x = np.zeros(self.width, dtype=np.float32)
            self.mask(x, op)
            padded = np.zeros(-(-self.width // 32) * 32, dtype=np.uint8)
            padded[: self.width] = x == 0.0
            self._bits = np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32, copy=False)
            self._bits_banned = op.banned
        return self._bits

    def add_bias(self, x: F32) -> None:
        if self._bias_ids.size:
            x[self._bias_ids] += self._bias

    def mask(self, x: F32, op: SampleOp) -> None:
        """−inf for all but `allowed_token_ids`, for bad words about to be completed, and for `op.banned`."""
        if self._allowed is not None:
            allowed = x[self._allowed]
            x.fill(_MASKED)
            x[self._allowed] = allowed
        x[self._bad_tokens] = _MASKED
        for prefix, last in self._bad_sequences:
            if op.output[-len(prefix) :] == prefix:
                x[last] = _MASKED
        if op.banned:
            # EOS ids come from the model's files and may lie beyond the head: then nothing is to ban.
            x[[i for i in op.banned if 0 <= i < x.size]] = _MASKED

    def penalise(self, x: F32, op: SampleOp) -> None:
        """Repetition over prompt and output, then frequency and presence over output only."""
        if not self._penalties:
            return
        output, counts = np.unique(_ids("output", op.output, self.width), return_counts=True)
        if self.params.repetition_penalty != 1.0:
            seen = np.union1d(self._unique_prompt(op.prompt), output)
            factor = np.float32(self.params.repetition_penalty)
            values = x[seen]
            x[seen] = np.where(values > 0, values / factor, values * factor)
        x[output] -= np.float32(self.params.frequency_penalty) * counts.astype(np.float32)
        x[output] -= np.float32(self.params.presence_penalty)

    def _unique_prompt(self, prompt: tuple[int, ...]) -> I64:
        """Cached by identity: the plan hands the same tuple at every step of a sequence."""
        if self._prompt is not prompt:
            self._prompt, self._prompt_ids = prompt, np.unique(_ids("prompt", prompt, self.width))
        return self._prompt_ids


def _ids(param: str, ids: Iterable[int] | dict[int, Any], width: int) -> I64:
    array = np.array(tuple(ids), dtype=np.int64)
    if array.size and not (array.min() >= 0 and array.max() < width):
        raise RequestError(
            f"'{param}' holds a token id outside the model's logits.", code="value_out_of_range", param=param
        )
    return array
