"""A block-quantised matrix as codes, scales and mins: the noun between `artifacts` (files) and kernels.

Value = scale · code + min, one scale and min per row and 32 columns. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP_SIZE = 32
"""Columns that share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCodes:
    """`codes` (rows, columns) int8: 0 … 15 if `bits` is 4, any if 8; `scales`, `mins` (rows, columns/32).

    `mins` None = all zero.
    """

    bits: int
    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    mins: npt.NDArray[np.float32] | None = None

    def with_rows(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> GroupCodes:
        """The same after `change`, a permutation of rows, of each array."""
        mins = None if self.mins is None else change(self.mins)
        return GroupCodes(bits=self.bits, codes=change(self.codes), scales=change(self.scales), mins=mins)


def stack(parts: Sequence[GroupCodes]) -> GroupCodes:
    """The parts below each other. 4-bit codes beside 8-bit ones are kept as 8-bit ones: equal values."""
    mins = None
    if any(p.mins is not None for p in parts):
        mins = np.concatenate([np.zeros_like(p.scales) if p.mins is None else p.mins for p in parts])
    return GroupCodes(
        bits=max(p.bits for p in parts),
        codes=np.concatenate([p.codes for p in parts]),
        scales=np.concatenate([p.scales for p in parts]),
        mins=mins,
    )
