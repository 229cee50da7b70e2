"""Measures which row counts the matrix product may be given so that rows do not depend on company.

BLAS libraries pick kernels by row count: one row differs from many, and rests of a tile differ from
whole tiles. Which multiples are safe depends on library, CPU and thread count, so it is measured at
start-up with the model's own matrices; nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

CANDIDATES = (4, 8, 16, 32)
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
_MAX_PROBE_ELEMENTS = 64 * 1024 * 1024
"""Multiply-adds per probed product; wide heads are probed with fewer rows."""

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def exact_row_multiple(linear: Linear, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> int | None:
    """The smallest candidate for which all probed products are exact, None if there is none.

    `weights` are (out, in) matrices; one of each shape is enough.
    """
    distinct = {tuple(w.shape): w for w in weights}.values()
    for multiple in CANDIDATES:
        if all(_exact(linear, w, multiple, dtype) for w in distinct) and _attention_exact(multiple):
            return multiple
    return None


def _exact(linear: Linear, weight: torch.Tensor, multiple: int, dtype: torch.dtype) -> bool:
    affordable = max(2 * multiple, _MAX_PROBE_ELEMENTS // max(1, weight.numel()))
    counts = [c * multiple for c in _COUNTS if c * multiple <= affordable]
    x = _noise(counts[-1], weight.shape[1]).to(weight.device, dtype)
    alone = torch.cat([linear(x[i : i + multiple], weight) for i in range(0, len(x), multiple)])
    # Also from another place within the tile: a row must not depend on where it stands.
    turned = linear(x[:multiple].roll(1, 0), weight).roll(-1, 0)
    return torch.equal(turned, alone[:multiple]) and all(
        torch.equal(linear(x[:count], weight), alone[:count]) for count in counts
    )


def _attention_exact(multiple: int) -> bool:
    """The same for the two batched products of attention, for usual head sizes."""
    for size in (16, 64, 128):
        queries, block = _noise(6 * 64, size).view(6, 64, size), _noise(6 * 64, size).view(6, 64, size)
        for right in (block.transpose(1, 2), block):
            left = queries if right.shape[1] == size else torch.bmm(queries, block.transpose(1, 2))
            whole = torch.bmm(left, right)
            for count in (multiple, 2 * multiple):
                for batch in (1, 2, 6):
                    part = torch.bmm(left[:batch, :count].contiguous(), right[:batch])
                    if not torch.equal(part, whole[:batch, :count]):
                        return False
    return True


def _noise(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator)
