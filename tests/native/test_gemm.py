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
    call = {
        "bf16": library.xn_pack_bf16,
        "w8g32": library.xn_quantize_w8g32,
        "w4g32": library.xn_quantize_w4g32,
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
