"""8-bit codes in groups of 16 and per channel: the files' values, the documented formula, rows alone."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Quant
from gguf.quants import dequantize

from tests.native.test_gemm import (  # noqa: F401  (fixtures)
    F32,
    Matrix,
    _at,
    _bits,
    _make,
    library,
    pools,
)
from xllm.artifacts.gguf_codes import group_codes
from xllm.codes import GroupCodes, stack
from xllm.engine.kernels.native.packing import Packer

CLASSES = ("w8g16", "w8g16 with mins", "w8a8")
# Whole and partial panels, odd panel counts, K of one group and of no power of two.
SHAPES = [(576, 576), (100, 64), (17, 96), (5, 32), (80, 1536), (48, 4864)]


def packed(lib: ctypes.CDLL, codes: GroupCodes) -> Matrix:
    handle = Packer(lib, None).codes(codes)
    handle._library = _Keep()  # freed by the Matrix below
    return Matrix(lib, handle.ptr, handle.num_out, handle.num_in)


class _Keep:
    def xn_matrix_free(self, _ptr: int) -> None: ...


def random_halves(num_out: int, num_in: int, mins: bool, seed: int = 0) -> GroupCodes:
    rng = np.random.default_rng(seed)
    groups = (num_out, num_in // 16)
    return GroupCodes(
        bits=8,
        codes=rng.integers(-128, 128, (num_out, num_in), dtype=np.int8),
        scales=rng.standard_normal(groups, dtype=np.float32) * np.float32(0.01),
        mins=rng.standard_normal(groups, dtype=np.float32) if mins else None,
    )


def make(lib: ctypes.CDLL, kind: str, num_out: int, num_in: int) -> Matrix:
    if kind == "w8a8":
        rows = np.random.default_rng(0).standard_normal((num_out, num_in), dtype=np.float32)
        return _make(lib.xn_quantize_w8a8, lib, num_out, num_in, rows)
    return packed(lib, random_halves(num_out, num_in, kind.endswith("mins")))


def in_runs(x: F32, run: int) -> tuple[F32, F32]:
    """8-bit codes of runs of inputs, (rows, runs, run), and their scales, (rows, runs, 1)."""
    runs = x.reshape(len(x), -1, run)
    largest = np.abs(runs).max(axis=2, keepdims=True)
    codes: F32 = np.rint(runs * (np.float32(127) / largest))
    return codes, largest / np.float32(127)


def rounded(x: F32, kind: str) -> F32:
    codes, scales = in_runs(x, x.shape[1] if kind == "w8a8" else 16)
    return (codes * scales).reshape(x.shape)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_product_is_that_of_the_rounded_operands(library, kind: str, num_out: int, num_in: int) -> None:  # noqa: F811
    rng = np.random.default_rng(1)
    matrix = make(library, kind, num_out, num_in)
    x = rng.standard_normal((37, num_in), dtype=np.float32)
    bias = rng.standard_normal(num_out, dtype=np.float32)
    inputs, weights = rounded(x, kind).astype(np.float64), matrix.values().T.astype(np.float64)
    # The min of a group cancels part of scale · code, so the bound counts both.
    terms = np.abs(inputs) @ np.abs(weights) + (
        np.abs(inputs).sum(1, keepdims=True) * 3 if "mins" in kind else 0
    )
    error = np.abs(matrix.linear(x, bias) - (inputs @ weights + bias))
    assert (error <= (terms + np.abs(bias)) * 1e-5).all()


@pytest.mark.parametrize(("num_out", "num_in"), [(100, 64), (80, 1536)])
def test_w8a8_is_its_formula_bit_for_bit(library, num_out: int, num_in: int) -> None:  # noqa: F811
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, (num_out, num_in), dtype=np.int8)
    scales = rng.uniform(1e-3, 1e-1, num_out).astype(np.float32)
    matrix = _make(library.xn_pack_w8a8, library, num_out, num_in, codes, scales)
    assert np.array_equal(matrix.values(), codes.astype(np.float32) * scales[:, None])
    x = rng.standard_normal((13, num_in), dtype=np.float32)
    inputs, steps = in_runs(x, num_in)
    sums = inputs[:, 0].astype(np.int64) @ codes.T.astype(np.int64)
    expected = (sums.astype(np.float32) * scales) * steps[:, 0]
    assert np.array_equal(_bits(matrix.linear(x)), _bits(expected))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_out", "num_in"), [(100, 64), (240, 576), (48, 4864)])
def test_a_row_has_the_same_bits_in_any_company(
    library,  # noqa: F811
    pools,  # noqa: F811
    kind: str,
    num_threads: int,
    num_out: int,
    num_in: int,
) -> None:
    rng = np.random.default_rng(3)
    matrix = make(library, kind, num_out, num_in)
    x = rng.standard_normal((150, num_in), dtype=np.float32)
    bias = rng.standard_normal(num_out, dtype=np.float32)
    whole = matrix.linear(x, bias, None)
    for _ in range(3):
        order = rng.permutation(len(x))
        borders = np.sort(rng.choice(np.arange(1, len(x)), size=int(rng.integers(1, 40)), replace=False))
        for part in np.split(order, borders):
            assert np.array_equal(_bits(matrix.linear(x[part], bias, pools[num_threads])), _bits(whole[part]))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_number_of_rows_gives_the_same_bits(library, kind: str) -> None:  # noqa: F811
    matrix = make(library, kind, 144, 128)  # nine panels: four-, three-, two- and one-panel tiles occur
    x = np.random.default_rng(4).standard_normal((40, 128), dtype=np.float32)
    alone = np.concatenate([matrix.linear(x[i : i + 1]) for i in range(len(x))])
    for rows in range(1, 41):
        assert np.array_equal(_bits(matrix.linear(x[:rows])), _bits(alone[:rows])), rows


@pytest.mark.parametrize("kind", CLASSES)
def test_a_nan_reaches_its_own_row_and_no_other(library, kind: str) -> None:  # noqa: F811
    matrix = make(library, kind, 48, 96)
    x = np.random.default_rng(5).standard_normal((9, 96), dtype=np.float32)
    clean = matrix.linear(x)
    for poison in (np.nan, np.inf):
        x[4, 40] = poison
        y = matrix.linear(x)
        assert not np.isfinite(y[4]).any()
        assert np.array_equal(np.delete(y, 4, axis=0), np.delete(clean, 4, axis=0))


@pytest.mark.parametrize("kind", ["w8g16", "w8a8"])
def test_zero_rows_give_exactly_the_bias(library, kind: str) -> None:  # noqa: F811
    bias = np.random.default_rng(6).standard_normal(40, dtype=np.float32)
    y = make(library, kind, 40, 64).linear(np.zeros((3, 64), dtype=np.float32), bias)
    assert np.array_equal(y, np.tile(bias, (3, 1)))


def test_the_largest_codes_do_not_overflow_the_integer_sum(library) -> None:  # noqa: F811
    num_in = 1 << 16
    codes = np.full((2, num_in), 127, dtype=np.int8)
    scales = np.array([1, -1], dtype=np.float32)
    matrix = _make(library.xn_pack_w8a8, library, 2, num_in, codes, scales)
    x = np.full((1, num_in), 127, dtype=np.float32)
    expected = np.float32(127 * 127 * num_in)
    assert matrix.linear(x).tolist() == [[expected, -expected]]
    assert matrix.linear(-x).tolist() == [[-expected, expected]]
    wider = np.zeros((1, num_in + 32), dtype=np.int8)
    handle = ctypes.c_void_p()
    pack = library.xn_pack_w8a8
    assert pack(None, _at(wider), _at(scales), 1, num_in + 32, ctypes.addressof(handle)) != 0


def k_blocks(kind: Quant, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes with finite float16 scales of a usual size."""
    rng = np.random.default_rng(seed)
    per_block, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // per_block, size), dtype=np.uint8)
    scales = (rng.standard_normal((rows, columns // per_block, 2)) * 0.01).astype(np.float16).view(np.uint8)
    if kind == Quant.Q6_K:
        blocks[..., -2:] = scales[..., :2]
    else:
        blocks[..., :4] = scales
    return blocks.reshape(rows, -1)


def test_packed_q6_k_values_are_those_of_the_file_bit_for_bit(library) -> None:  # noqa: F811
    raw = k_blocks(Quant.Q6_K, 50, 512, 7)
    codes = group_codes(raw, Quant.Q6_K, (50, 512))
    assert codes is not None
    matrix = packed(library, codes)
    assert library.xn_matrix_class(matrix.handle) == 4
    assert np.array_equal(matrix.values(), dequantize(raw, Quant.Q6_K))


def test_a_q6_k_part_keeps_the_values_of_its_neighbours(library) -> None:  # noqa: F811
    kinds = (Quant.Q4_K, Quant.Q6_K, Quant.Q5_K)
    raws = [k_blocks(kind, 20, 256, seed) for seed, kind in enumerate(kinds)]
    parts = [group_codes(raw, kind, (20, 256)) for raw, kind in zip(raws, kinds, strict=True)]
    matrix = packed(library, stack([p for p in parts if p is not None]))
    expected = [dequantize(raw, kind) for raw, kind in zip(raws, kinds, strict=True)]
    assert np.array_equal(matrix.values(), np.concatenate(expected))
