"""`RowDrawer` over the native kernels: all rows of a step in one call, a row to a thread.

Tokens equal those of the numpy drawer bit for bit. What must not live here: arithmetic on logits.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from xllm.engine.kernels.native.library import check
from xllm.engine.sampling.arrays import F32, U32
from xllm.engine.sampling.drawing import (
    GREEDY_BELOW,
    OVERFLOWN,
    Drawn,
    SampleRow,
    no_token_allowed,
    not_finite,
)
from xllm.errors import InternalError, XllmError

_ROW = struct.Struct("@PPQddfiIiq")
"""`xn_sample_row`."""

_NOT_FINITE, _NONE_ALLOWED, _OVERFLOW = 101, 102, 103
_MAX_TOP_K = 2**31 - 1
_MASK_64 = 2**64 - 1


class NativeDrawer:
    """Shares the pool of the forward pass, so it is used by the step thread alone."""

    def __init__(self, library: ctypes.CDLL, pool: int | None) -> None:
        self._lib = library
        self._pool = pool
        self._workspace = np.empty(0, dtype=np.uint8)
        self._width = 0
        self._workspace_ptr = 0

    def draw(self, logits: F32, rows: Sequence[SampleRow], shaped: Mapping[int, F32]) -> list[Drawn]:
        if not rows:
            return []
        width = logits.shape[1]
        if width != self._width:
            self._make_room(width)
        specs, choices = encode_rows(logits.ctypes.data, logits.strides[0], width, rows, shaped)
        count, num_choices = len(rows), len(choices)
        tokens, status = (ctypes.c_int64 * num_choices)(), (ctypes.c_int32 * count)()
        check(
            self._lib.xn_sample(
                self._pool, specs, count, width, struct.pack(f"{num_choices}I", *choices), tokens,
                status, self._workspace_ptr,
            )
        )  # fmt: skip
        return outcomes(rows, tokens[:], status[:])

    def _make_room(self, width: int) -> None:
        self._workspace = np.empty(self._lib.xn_sample_bytes(self._pool, width), dtype=np.uint8)
        self._workspace_ptr = self._workspace.ctypes.data
        self._width = width


def encode_rows(
    base: int, stride: int, width: int, rows: Sequence[SampleRow], shaped: Mapping[int, F32], first: int = 0
) -> tuple[bytes, list[int]]:
    """(`xn_sample_row` of each, their choices), over logits at `base` with `stride` bytes between rows.

    `first` choices of others come before. Masks and shaped rows are pointed to: the caller holds them.
    """
    pack = _ROW.pack
    specs: list[bytes] = []
    choices: list[int] = []
    for i, (logit_row, op, allowed) in enumerate(rows):
        p = op.params
        specs.append(
            pack(
                _address(shaped[i]) if i in shaped else base + logit_row * stride,
                0 if allowed is None else _mask_address(allowed, width),
                op.seed & _MASK_64,
                p.top_p,
                p.min_p,
                0.0 if p.temperature < GREEDY_BELOW else p.temperature,
                p.top_k if p.top_k < _MAX_TOP_K else _MAX_TOP_K,
                op.offset,
                len(op.choices),
                first + len(choices),
            )
        )
        choices += op.choices
    return b"".join(specs), choices


def outcomes(rows: Sequence[SampleRow], tokens: list[int], status: list[int]) -> list[Drawn]:
    found: list[Drawn] = []
    first = 0
    for row, code in zip(rows, status, strict=True):
        end = first + len(row.op.choices)
        found.append(_error(code) if code else tuple(tokens[first:end]))
        first = end
    return found


def _error(code: int) -> XllmError:
    if code == _NONE_ALLOWED:
        return no_token_allowed()
    if code in (_NOT_FINITE, _OVERFLOW):
        return not_finite(OVERFLOWN if code == _OVERFLOW else "logits")
    return InternalError("the native sampler failed")


def _address(array: F32 | U32) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _mask_address(allowed: U32, width: int) -> int:
    if allowed.dtype != np.uint32 or not allowed.flags.c_contiguous or 32 * allowed.size < width:
        raise InternalError("a mask of allowed tokens has another form than the sampler takes")
    return _address(allowed)
