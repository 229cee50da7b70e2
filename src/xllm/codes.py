"""A block-quantised matrix as codes, scales and mins: the noun between `artifacts` (files) and kernels.

Value = scale · code + min, one scale and min per row and group of columns. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP_SIZE = 32
"""Columns that share a scale in most formats."""
HALF_GROUP_SIZE = 16
"""The same in Q6_K; such codes always count as 8-bit ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCodes:
    """`codes` (rows, columns) int8: 0 … 15 if `bits` is 4, any if 8; `scales`, `mins` (rows, groups).

    `mins` None = all zero. Groups have 32 columns, or 16 if `bits` is 8.
    """

    bits: int
    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    mins: npt.NDArray[np.float32] | None = None

    @property
    def group_size(self) -> int:
        return int(self.codes.shape[1]) // int(self.scales.shape[1])

    def with_rows(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> GroupCodes:
        """The same after `change`, a permutation of rows, of each array."""
        mins = None if self.mins is None else change(self.mins)
        return GroupCodes(bits=self.bits, codes=change(self.codes), scales=change(self.scales), mins=mins)


def stack(parts: Sequence[GroupCodes]) -> GroupCodes:
    """The parts below each other, with equal values.

    Of different kinds, the finer one holds all: 8-bit codes the 4-bit ones, groups of 16 those of 32.
    """
    group = min(p.group_size for p in parts)
    mins = None
    if any(p.mins is not None for p in parts):
        mins = np.concatenate(
            [
                _split(np.zeros_like(p.scales) if p.mins is None else p.mins, p.group_size // group)
                for p in parts
            ]
        )
    return GroupCodes(
        bits=max(p.bits for p in parts),
        codes=np.concatenate([p.codes for p in parts]),
        scales=np.concatenate([_split(p.scales, p.group_size // group) for p in parts]),
        mins=mins,
    )


def _split(per_group: npt.NDArray[np.float32], pieces: int) -> npt.NDArray[np.float32]:
    """Scales or mins of groups cut into so many equal ones."""
    return per_group if pieces == 1 else np.repeat(per_group, pieces, axis=1)
