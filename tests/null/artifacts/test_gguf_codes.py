"""Codes, scales and mins read from GGUF blocks mean exactly what `gguf` dequantises."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Quant
from gguf.quants import dequantize

from xllm.artifacts.gguf_codes import group_codes
from xllm.codes import GroupCodes, stack

FORMATS = [Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.Q8_0, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K]
ROWS, COLUMNS = 5, 512


def random_blocks(kind: Quant, seed: int = 0) -> np.ndarray:
    """Random bytes with finite float16 scales of a usual size."""
    rng = np.random.default_rng(seed)
    per_block, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // per_block, num_bytes), dtype=np.uint8)
    num_halves = 1 if kind in (Quant.Q4_0, Quant.Q5_0, Quant.Q8_0, Quant.Q6_K) else 2
    halves = (rng.standard_normal((*blocks.shape[:2], num_halves)) * 0.01).astype(np.float16)
    at = 208 if kind == Quant.Q6_K else 0
    blocks[:, :, at : at + 2 * num_halves] = halves.view(np.uint8)
    return blocks.reshape(ROWS, -1)


def values(codes: GroupCodes) -> np.ndarray:
    grouped = (
        codes.codes.reshape(*codes.scales.shape, codes.group_size).astype(np.float32)
        * codes.scales[..., None]
    )
    if codes.mins is not None:
        grouped = grouped + codes.mins[..., None]
    return grouped.reshape(codes.codes.shape)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda k: k.name)
def test_codes_equal_the_dequantised_values_bit_for_bit(kind: Quant) -> None:
    raw = random_blocks(kind)
    codes = group_codes(raw, kind, (ROWS, COLUMNS))
    assert codes is not None
    assert codes.bits == (4 if kind.name.startswith("Q4") else 8)
    if codes.bits == 4:
        assert codes.codes.min() >= 0
        assert codes.codes.max() <= 15
    np.testing.assert_array_equal(values(codes), dequantize(raw, kind))


def test_formats_whose_codes_would_not_pay_have_none() -> None:
    for kind in (Quant.Q2_K, Quant.Q3_K):
        per_block, num_bytes = GGML_QUANT_SIZES[kind]
        assert group_codes(np.zeros(num_bytes, dtype=np.uint8), kind, (1, per_block)) is None


@pytest.mark.parametrize(
    ("kinds", "bits", "group_size"),
    [
        ((Quant.Q4_0, Quant.Q4_1), 4, 32),
        ((Quant.Q4_0, Quant.Q8_0, Quant.Q4_1), 8, 32),
        ((Quant.Q4_K, Quant.Q6_K, Quant.Q8_0), 8, 16),
        ((Quant.Q6_K, Quant.Q6_K), 8, 16),
    ],
)
def test_stacked_parts_of_different_kinds_keep_their_values(
    kinds: tuple[Quant, ...], bits: int, group_size: int
) -> None:
    parts = [group_codes(random_blocks(k), k, (ROWS, COLUMNS)) for k in kinds]
    together = stack([p for p in parts if p is not None])
    assert (together.bits, together.group_size) == (bits, group_size)
    np.testing.assert_array_equal(
        values(together), np.concatenate([values(p) for p in parts if p is not None])
    )
