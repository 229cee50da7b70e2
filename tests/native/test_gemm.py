"""The packed linear: exact for any company of rows, close to float64, faithful to the files' codes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

from xllm.engine.kernels.native.isa import ISAS
from xllm.engine.kernels.native.library import find, open_library

F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
CLASSES = ("bf16", "w8g32", "w4g32")
# Whole and partial panels, odd panel counts, K of one group and of no power of two.
SHAPES = [(576, 576), (100, 64), (17, 96), (5, 32), (80, 1536), (48, 4864)]


@pytest.fixture(scope="module", params=[isa.name for isa in ISAS])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Every instruction-set path that is built and that this CPU can run."""
    path, reason = find(frozenset({request.param}))
    if path is None:
        pytest.skip(reason)
    return open_library(path)


@pytest.fixture(scope="module")
def pools(library: ctypes.CDLL) -> Iterator[dict[int, int | None]]:
    """By number of threads; more than this machine has, so that some are always descheduled."""
    made: dict[int, int | None] = {1: None, 2: library.xn_pool_create(2), 5: library.xn_pool_create(5)}
    yield made
    for pool in made.values():
        library.xn_pool_destroy(pool)


@dataclass(slots=True)
class Matrix:
    library: ctypes.CDLL
    handle: int
    num_out: int
    num_in: int

    def __del__(self) -> None:
        self.library.xn_matrix_free(self.handle)

    def values(self) -> F32:
        rows = np.empty((self.num_out, self.num_in), dtype=np.float32)
        ids = np.arange(self.num_out, dtype=np.int64)
        code = self.library.xn_matrix_rows(self.handle, _at(ids), len(ids), _at(rows), self.num_in)
        assert code == 0
        return rows

    def linear(self, x: F32, bias: F32 | None = None, pool: int | None = None) -> F32:
        """Rows and columns around input and output are NaN and stay untouched."""
        wide = np.full((len(x), self.num_in + 5), np.nan, dtype=np.float32)
        wide[:, : self.num_in] = x
        out = np.full((len(x) + 1, self.num_out + 3), np.nan, dtype=np.float32)
        code = self.library.xn_linear(
            pool, self.handle, _at(wide), len(x), wide.shape[1], None if bias is None else _at(bias),
            _at(out), out.shape[1],
        )  # fmt: skip
        assert code == 0
        assert np.isnan(out[-1]).all()
        assert np.isnan(out[:, self.num_out :]).all()
        return out[:-1, : self.num_out].copy()


def _at(array: Array) -> int:
    return array.ctypes.data


def _make(
    call: Callable[..., int], library: ctypes.CDLL, num_out: int, num_in: int, *arrays: object
) -> Matrix:
    handle = ctypes.c_void_p()
    pointers = [None if a is None else _at(a) for a in arrays]
    assert call(None, *pointers, num_out, num_in, ctypes.addressof(handle)) == 0
    return Matrix(library, handle.value or 0, num_out, num_in)


def _random(library: ctypes.CDLL, kind: str, num_out: int, num_in: int, seed: int = 0) -> Matrix:
    rows = np.random.default_rng(seed).standard_normal((num_out, num_in), dtype=np.float32)
    if kind == "w8g16":
        codes = np.clip(np.rint(rows * np.float32(30)), -128, 127).astype(np.int8)
        scales = np.abs(rows[:, ::16]).copy()
        return _make(library.xn_pack_w8g16, library, num_out, num_in, codes, scales, None)
    call = {
        "bf16": library.xn_pack_bf16,
        "w8g32": library.xn_quantize_w8g32,
        "w4g32": library.xn_quantize_w4g32,
        "w8a8": library.xn_quantize_w8a8,
    }
    return _make(call[kind], library, num_out, num_in, rows)


def _bits(x: F32) -> npt.NDArray[np.uint32]:
    return x.view(np.uint32)


def _to_bf16(x: F32) -> F32:
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def _to_groups(x: F32) -> F32:
    """What 8-bit codes per row and group of 32 stand for."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    codes = np.rint(groups * factor)
    rounded: F32 = (codes * (largest / np.float32(127))).astype(np.float32).reshape(x.shape)
    return rounded


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_product_is_that_of_the_rounded_operands(
    library: ctypes.CDLL, kind: str, num_out: int, num_in: int
) -> None:
    random = np.random.default_rng(1)
    matrix = _random(library, kind, num_out, num_in)
    x = random.standard_normal((37, num_in), dtype=np.float32)
    bias = random.standard_normal(num_out, dtype=np.float32)
    rounded = _to_bf16(x) if kind == "bf16" else _to_groups(x)
    terms = np.abs(rounded).astype(np.float64) @ np.abs(matrix.values()).T.astype(np.float64)
    exact = rounded.astype(np.float64) @ matrix.values().T.astype(np.float64) + bias
    # Float32 sums are off by some last places of the terms; a lost input or scale by far more.
    assert (np.abs(matrix.linear(x, bias) - exact) <= (terms + np.abs(bias)) * 1e-5).all()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize(("num_out", "num_in"), [(100, 64), (576, 576), (48, 4864)])
def test_a_row_has_the_same_bits_in_any_company(
    library: ctypes.CDLL, pools: dict[int, int | None], kind: str, num_threads: int, num_out: int, num_in: int
) -> None:
    random = np.random.default_rng(2)
    matrix = _random(library, kind, num_out, num_in)
    x = random.standard_normal((301, num_in), dtype=np.float32)
    bias = random.standard_normal(num_out, dtype=np.float32)
    whole = matrix.linear(x, bias, None)
    for _ in range(6):
        order = random.permutation(len(x))
        borders = np.sort(
            random.choice(np.arange(1, len(x)), size=int(random.integers(1, 60)), replace=False)
        )
        for part in np.split(order, borders):
            assert np.array_equal(_bits(matrix.linear(x[part], bias, pools[num_threads])), _bits(whole[part]))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_number_of_rows_gives_the_same_bits(library: ctypes.CDLL, kind: str) -> None:
    matrix = _random(library, kind, 144, 128)  # nine panels: four-, three-, two- and one-panel tiles occur
    x = np.random.default_rng(3).standard_normal((64, 128), dtype=np.float32)
    alone = np.concatenate([matrix.linear(x[i : i + 1]) for i in range(len(x))])
    for rows in range(1, 65):
        assert np.array_equal(_bits(matrix.linear(x[:rows])), _bits(alone[:rows])), rows


@pytest.mark.parametrize("kind", ["bf16", "w8g32"])
def test_a_nan_reaches_its_own_row_and_no_other(library: ctypes.CDLL, kind: str) -> None:
    matrix = _random(library, kind, 48, 96)
    x = np.random.default_rng(4).standard_normal((9, 96), dtype=np.float32)
    clean = matrix.linear(x)
    for poison in (np.nan, np.inf):
        x[4, 40] = poison
        y = matrix.linear(x)
        assert not np.isfinite(y[4]).any()
        assert np.array_equal(np.delete(y, 4, axis=0), np.delete(clean, 4, axis=0))


def test_zero_rows_give_exactly_the_bias(library: ctypes.CDLL) -> None:
    bias = np.random.default_rng(5).standard_normal(40, dtype=np.float32)
    for kind in CLASSES:
        y = _random(library, kind, 40, 64).linear(np.zeros((3, 64), dtype=np.float32), bias)
        assert np.array_equal(y, np.tile(bias, (3, 1)))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"], ids=lambda name: f"gguf {name}")
def test_packed_values_are_those_of_the_file_bit_for_bit(library: ctypes.CDLL, name: str) -> None:
    kind = GGMLQuantizationType[name]
    rows = np.random.default_rng(6).standard_normal((50, 192), dtype=np.float32)
    rows[3, 32:64] = 0
    packed = quants.quantize(rows, kind).reshape(50, 6, -1)

    def halves(start: int) -> F32:
        return (
            np.ascontiguousarray(packed[:, :, start : start + 2]).view(np.float16).astype(np.float32)[..., 0]
        )

    scales = np.ascontiguousarray(halves(0))
    if name == "Q8_0":
        codes = np.ascontiguousarray(packed[:, :, 2:]).view(np.int8).reshape(50, 192)
        matrix = _make(library.xn_pack_w8g32, library, 50, 192, codes, scales, None)
    else:
        nibbles = packed[:, :, 2 if name == "Q4_0" else 4 :]
        codes4 = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(50, 192)
        mins = np.ascontiguousarray(scales * np.float32(-8) if name == "Q4_0" else halves(2))
        matrix = _make(library.xn_pack_w4g32, library, 50, 192, np.ascontiguousarray(codes4), scales, mins)
    assert np.array_equal(matrix.values(), quants.dequantize(packed.reshape(50, -1), kind))


def test_bf16_values_are_rounded_to_nearest_even(library: ctypes.CDLL) -> None:
    rows = np.random.default_rng(7).standard_normal((33, 64), dtype=np.float32)
    rows[0, :3] = np.array([0x3F808000, 0x3F818000, 0x3F808001], dtype=np.uint32).view(np.float32)
    matrix = _make(library.xn_pack_bf16, library, 33, 64, rows)
    assert np.array_equal(_bits(matrix.values()), _bits(_to_bf16(rows)))


def test_scales_beyond_half_precision_are_kept(library: ctypes.CDLL) -> None:
    random = np.random.default_rng(8)
    codes = random.integers(-128, 128, (20, 64), dtype=np.int8)
    scales = random.uniform(1e-9, 1e-8, (20, 2)).astype(np.float32)
    mins = random.uniform(-1e5, 1e5, (20, 2)).astype(np.float32)
    matrix = _make(library.xn_pack_w8g32, library, 20, 64, codes, scales, mins)
    expected = codes.reshape(20, 2, 32) * scales[..., None] + mins[..., None]
    assert np.array_equal(matrix.values(), expected.reshape(20, 64).astype(np.float32))


def test_bad_shapes_are_refused(library: ctypes.CDLL) -> None:
    handle = ctypes.c_void_p()
    rows = np.zeros((4, 40), dtype=np.float32)
    made = ctypes.addressof(handle)
    assert library.xn_quantize_w8g32(None, _at(rows), 4, 40, made) != 0
    assert library.xn_pack_bf16(None, _at(rows), 0, 40, made) != 0
    assert library.xn_pack_bf16(None, _at(rows), 4, 39, made) != 0
    assert handle.value is None
    matrix = _random(library, "bf16", 4, 40)
    assert library.xn_linear(None, matrix.handle, _at(rows), 4, 39, None, _at(rows), 4) != 0
    assert library.xn_linear(None, matrix.handle, _at(rows), 0, 40, None, _at(rows), 4) != 0
    ids = np.array([4], dtype=np.int64)
    assert library.xn_matrix_rows(matrix.handle, _at(ids), 1, _at(rows), 40) != 0


def test_every_item_runs_once_whatever_the_number_of_threads(
    library: ctypes.CDLL, pools: dict[int, int | None]
) -> None:
    item = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    parallel = library.xn_parallel
    for num_threads, pool in pools.items():
        for count in (0, 1, 2, 7, 100):
            seen: list[int] = []
            workers: set[int] = set()

            def note(
                _context: int, index: int, worker: int, seen: list[int] = seen, workers: set[int] = workers
            ) -> None:
                seen.append(index)
                workers.add(worker)

            parallel(ctypes.c_void_p(pool), ctypes.c_int64(count), item(note), None)
            assert sorted(seen) == list(range(count))
            assert workers <= set(range(num_threads))


STORE, ADD_RESIDUAL, SILU_MUL, GELU_TANH_MUL = range(4)


def _rounded(library: ctypes.CDLL, matrix: Matrix, x: F32, pool: int | None, norm: F32 | None) -> Array:
    """Rounded rows of x, or of x normed with the weight `norm`; aligned, with a guard behind them."""
    size = library.xn_rounded_stride(matrix.handle) * len(x)
    memory = np.full(size + 128, 0xAB, dtype=np.uint8)
    start = -_at(memory) % 64
    rows = memory[start : start + size]
    if norm is None:
        code = library.xn_round_rows(pool, matrix.handle, _at(x), len(x), x.shape[1], _at(rows))
    else:
        code = library.xn_rms_norm_rounded(
            pool, matrix.handle, _at(x), len(x), x.shape[1], _at(norm), 1e-5, 1.0, _at(rows)
        )
    assert code == 0
    assert (memory[start + size :] == 0xAB).all()
    return rows


def _unfused(
    library: ctypes.CDLL, matrix: Matrix, x: F32, bias: F32 | None, epilogue: int, residual: F32
) -> F32:
    product = matrix.linear(x, bias)
    rows, width = product.shape
    if epilogue == STORE:
        return product
    if epilogue == ADD_RESIDUAL:
        y = np.empty_like(product)
        assert (
            library.xn_add(None, _at(residual), width, _at(product), width, rows, width, _at(y), width) == 0
        )
        return y
    call = library.xn_silu_mul if epilogue == SILU_MUL else library.xn_gelu_tanh_mul
    y = np.empty((rows, width // 2), dtype=np.float32)
    assert call(None, _at(product), width, rows, width // 2, _at(y), width // 2) == 0
    return y


@pytest.mark.parametrize("kind", [*CLASSES, "w8a8", "w8g16"])
@pytest.mark.parametrize("epilogue", [STORE, ADD_RESIDUAL, SILU_MUL, GELU_TANH_MUL])
@pytest.mark.parametrize("seed", range(8))
def test_fused_calls_give_the_bits_of_separate_ones(
    library: ctypes.CDLL, pools: dict[int, int | None], kind: str, epilogue: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    # Halves of whole panels, of part of one, of one panel and a part; odd and even numbers of panels.
    num_out = 2 * int(random.choice([16, 48, 112, 128, 5, 40, 57]))
    num_in, rows = int(random.choice([32, 96, 576])), int(random.choice([1, 2, 3, 7, 9, 12, 13, 31, 64, 130]))
    pool = pools[1 + seed % 2]
    matrix = _random(library, kind, num_out, num_in, seed)
    x = random.standard_normal((rows, num_in), dtype=np.float32) * np.float32(3)
    residual = random.standard_normal((rows, num_out), dtype=np.float32)
    bias = random.standard_normal(num_out, dtype=np.float32) if seed % 3 else None
    norm = random.standard_normal(num_in, dtype=np.float32) if seed % 4 else None
    normed = x
    if norm is not None:
        normed = np.empty_like(x)
        library.xn_rms_norm(None, _at(x), rows, 1, num_in, num_in, _at(norm), 1e-5, 1.0, _at(normed), num_in)
    expected = _unfused(library, matrix, normed, bias, epilogue, residual)
    width = expected.shape[1]
    sources = [(normed, None), (None, _rounded(library, matrix, x, pool, norm))]
    for (from_x, from_rounded), in_place in zip(sources, (False, True), strict=True):
        y = np.full((rows + 1, width + 3), np.nan, dtype=np.float32)
        if in_place and epilogue == ADD_RESIDUAL:
            y[:-1, :width] = residual
            source, ldr = y, width + 3
        else:
            source, ldr = residual, num_out
        code = library.xn_linear_fused(
            pool, matrix.handle, None if from_x is None else _at(from_x),
            None if from_rounded is None else _at(from_rounded), rows, num_in,
            None if bias is None else _at(bias), epilogue, _at(source), ldr, _at(y), width + 3,
        )  # fmt: skip
        assert code == 0
        assert np.array_equal(_bits(y[:-1, :width].copy()), _bits(expected))
        assert np.isnan(y[-1]).all()
        assert np.isnan(y[:, width:]).all()


def test_one_rounding_serves_all_matrices_in_groups_of_32(library: ctypes.CDLL) -> None:
    random = np.random.default_rng(9)
    x = random.standard_normal((5, 64), dtype=np.float32)
    codes = random.integers(0, 16, (40, 64), dtype=np.uint8)
    scales = random.uniform(0.5, 1, (40, 2)).astype(np.float16).astype(np.float32)
    made = [
        _random(library, "w8g32", 40, 64),
        _random(library, "w4g32", 40, 64),
        _make(library.xn_pack_w4g32, library, 40, 64, codes, scales, scales * np.float32(-8)),
    ]
    for owner in made:
        rounded = _rounded(library, owner, x, None, None)
        for matrix in made:
            y = np.empty((5, 40), dtype=np.float32)
            code = library.xn_linear_fused(
                None, matrix.handle, None, _at(rounded), 5, 0, None, STORE, None, 0, _at(y), 40
            )
            assert code == 0
            assert np.array_equal(_bits(y), _bits(matrix.linear(x)))


def test_impossible_fusions_are_refused(library: ctypes.CDLL) -> None:
    matrix = _random(library, "bf16", 5, 32)
    x, y = np.zeros((1, 32), dtype=np.float32), np.zeros((1, 8), dtype=np.float32)

    def call(epilogue: int, source: F32 | None, residual: F32 | None, ldy: int) -> int:
        code: int = library.xn_linear_fused(
            None, matrix.handle, None if source is None else _at(source), None, 1, 32, None, epilogue,
            None if residual is None else _at(residual), 5, _at(y), ldy,
        )  # fmt: skip
        return code

    assert call(STORE, x, None, 5) == 0
    assert call(STORE, None, None, 5) != 0
    assert call(STORE, x, None, 4) != 0
    assert call(ADD_RESIDUAL, x, None, 5) != 0
    assert call(SILU_MUL, x, None, 5) != 0
    assert call(4, x, None, 5) != 0


def test_the_limits_of_the_machine_can_be_measured(
    library: ctypes.CDLL, pools: dict[int, int | None]
) -> None:
    once, twice = library.xn_multiply(2, 1), library.xn_multiply(2, 2)
    assert twice == 2 * once
    assert once > 0 or library.xn_isa() == b"portable"
    words = np.random.default_rng(0).integers(0, 2**62, (3 << 20) // 8 + 64, dtype=np.int64)
    digests = {library.xn_read_memory(pool, _at(words), words.nbytes) for pool in pools.values()}
    assert digests == {int(np.bitwise_xor.reduce(words))}


@pytest.mark.parametrize("kind", [*CLASSES, "w8a8", "w8g16"])
def test_the_largest_gated_tile_stays_within_its_memory(library: ctypes.CDLL, kind: str) -> None:
    random = np.random.default_rng(10)
    matrix = _random(library, kind, 96, 64)  # three panels of gates: nine rows make the largest tile
    x = random.standard_normal((9, 64), dtype=np.float32)
    y = np.empty((9, 48), dtype=np.float32)
    code = library.xn_linear_fused(
        None, matrix.handle, _at(x), None, 9, 64, None, SILU_MUL, None, 0, _at(y), 48
    )
    assert code == 0
    assert np.array_equal(_bits(y), _bits(_unfused(library, matrix, x, None, SILU_MUL, x)))
