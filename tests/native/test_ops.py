"""Every native op against the torch reference within its rounding, and bitwise against itself."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.native_driver import library
from xllm.engine.kernels.native.isa import ISAS
from xllm.engine.kernels.ops import KVSpan, RopeTable
from xllm.errors import InternalError
from xllm.types import PAGE_SIZE, KVGroup

torch = pytest.importorskip("torch", reason="the reference needs the extra xllm[torch]")

from xllm.engine.kernels.native.ops import NativeOps  # noqa: E402
from xllm.engine.kernels.reference.torch_ops import TorchOps  # noqa: E402

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")

# Odd widths leave an incomplete vector at the end of a row, odd rows an incomplete tile.
WIDTHS = [16, 96, 576, 1001]
ROWS = 37


@pytest.fixture(
    scope="module", params=[(i.name, n) for i in ISAS for n in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    path, num_threads = request.param
    found = library(path)
    if found is None:
        pytest.skip(f"the {path} kernels are not built, or this CPU cannot run them")
    return NativeOps(found, num_threads)


@pytest.fixture(scope="module")
def coded(ops: NativeOps) -> NativeOps:
    """The same library with KV pages of 8-bit codes."""
    return NativeOps(ops._lib, 2, kv_dtype="int8")


@pytest.fixture(scope="module")
def reference() -> TorchOps:
    return TorchOps("float32")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def both(ops, reference, op, x: np.ndarray, tolerance: float = 2e-6, **more) -> np.ndarray:
    """Runs `op(backend, handle)` on both, compares, and repeats it for cut rows; the native result."""
    whole = ops.to_numpy(op(ops, ops.rows(x))).copy()
    expected = reference.to_numpy(op(reference, torch.from_numpy(x)))
    np.testing.assert_allclose(whole, expected, rtol=tolerance, atol=tolerance)
    for cut in (1, 2, 5, 16):
        pieces = [ops.to_numpy(op(ops, ops.rows(x[i : i + cut]))).copy() for i in range(0, len(x), cut)]
        assert_same(np.concatenate(pieces), whole)
    return whole


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), np.argwhere(found != expected)[:5]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(ops, reference, width: int) -> None:
    w = noise(width, seed=1)
    for offset in (0.0, 1.0):
        both(ops, reference, lambda b, x, o=offset: b.rms_norm(x, b.vector(w), 1e-6, o), noise(ROWS, width))


def test_rms_norm_of_heads_norms_each_head_by_itself(ops, reference) -> None:
    w = noise(32, seed=1)
    both(ops, reference, lambda b, x: b.rms_norm(x, b.vector(w), 1e-6), noise(ROWS, 6 * 32))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(ops, reference, name: str, width: int) -> None:
    x = noise(ROWS, 2 * width) * 4
    x[0, :8] = [0.0, -0.0, 90.0, -90.0, 1e-6, -1e-6, 20.0, -20.0]
    both(ops, reference, lambda b, h: getattr(b, name)(h), x, 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_softcap(ops, reference, width: int) -> None:
    both(ops, reference, lambda b, x: b.softcap(x, 30.0), noise(ROWS, width) * 50)


@pytest.mark.parametrize("width", WIDTHS)
def test_add(ops, width: int) -> None:
    x, y = noise(ROWS, width), noise(ROWS, width, seed=2)
    assert_same(ops.to_numpy(ops.add(ops.rows(x), ops.rows(y))), x + y)


def test_many_rows_are_split_over_threads_without_a_change(ops) -> None:
    x, w = noise(2000, 576), noise(576, seed=1)
    whole = ops.to_numpy(ops.rms_norm(ops.rows(x), ops.vector(w), 1e-6)).copy()
    weight = ops.vector(w)
    alone = [ops.to_numpy(ops.rms_norm(ops.rows(row[None]), weight, 1e-6)).copy() for row in x]
    assert_same(whole, np.concatenate(alone))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_rope_on_a_view_of_the_fused_product(ops, reference, head_dim: int) -> None:
    cos, sin = noise(50, head_dim // 2, seed=4), noise(50, head_dim // 2, seed=5)
    positions = np.random.default_rng(6).integers(0, 50, ROWS)
    x = noise(ROWS, 5 * head_dim)

    def run(backend, handle):
        table = RopeTable(cos=backend.vector(cos), sin=backend.vector(sin))
        rows = backend.rope_rows(table, backend.indices(positions))
        q, _ = backend.split_columns(handle, (3 * head_dim, 2 * head_dim))
        return backend.rope(q, rows)

    found = ops.to_numpy(run(ops, ops.rows(x)))
    expected = reference.to_numpy(run(reference, torch.from_numpy(x)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_embedding_and_select_rows_copy_rows(ops) -> None:
    values = noise(100, 96)
    ids = np.array([0, 99, 3, 3, 50], dtype=np.int64)
    bf16 = TorchOps("bfloat16")
    for scale in (None, 9.797959):
        rows = ops.embedding(ops.indices(ids), ops.table(values), scale)
        expected = bf16.to_numpy(bf16.embedding(bf16.indices(ids), bf16.table(values), scale))
        assert_same(ops.to_numpy(rows), expected)
    picked = ops.select_rows(rows, ops.indices(np.array([4, 0], dtype=np.int64)))
    assert_same(ops.to_numpy(picked), ops.to_numpy(rows)[[4, 0]])


@pytest.mark.parametrize("bad", [-1, 100])
def test_ids_out_of_range_are_refused(ops, bad: int) -> None:
    table = ops.table(noise(100, 96))
    with pytest.raises(InternalError):
        ops.embedding(ops.indices(np.array([bad], dtype=np.int64)), table)
    with pytest.raises(InternalError):
        ops.select_rows(ops.rows(noise(100, 8)), ops.indices(np.array([bad], dtype=np.int64)))


# Attention: sequences with pages in a shuffled order, run whole and in pieces.


def group(heads: int, head_dim: int, window: int | None = None) -> KVGroup:
    kind = "full" if window is None else "window"
    return KVGroup(kind=kind, layers=(0, 1), num_kv_heads=heads, head_dim=head_dim, window=window)


CASES = {
    "gqa": (9, 3, 64, None, None),
    "mha-32": (2, 2, 32, None, None),
    "mqa-128": (4, 1, 128, None, None),
    "wide-group": (14, 2, 64, None, None),
    "uneven-80": (4, 2, 80, None, None),
    "window": (4, 2, 64, 70, None),
    "small-window": (4, 2, 64, 5, None),
    "softcap": (4, 2, 64, None, 30.0),
}


PIECES = {"ones": [1] * 203, "pages": [64, 64, 64, 11], "sevens": [7] * 29, "decode": [150, *[1] * 53]}


def attend(backend, make, case: str, q, k, v, pieces, num_pages: int = 12) -> np.ndarray:
    """Runs one sequence in `pieces` of rows through layer 1; its outputs in order."""
    heads, kv_heads, size, window, softcap = CASES[case]
    layers = group(kv_heads, size, window)
    pages = backend.kv_pages(layers, num_pages)
    order = [int(p) for p in np.random.default_rng(0).permutation(num_pages)]
    outs, start = [], 0
    for count in pieces:
        rows = slice(start, start + count)
        padded = -(-count // backend.row_multiple) * backend.row_multiple
        x = [np.pad(t[rows], ((0, padded - count), (0, 0))) for t in (q, k, v)]
        span = KVSpan(row=0, num_rows=count, start=start, pages=tuple(order))
        plan = backend.attention_plan(layers, heads, [span], padded)
        out = backend.attention(*(make(t) for t in x), pages, 1, plan, scale=size**-0.5, softcap=softcap)
        outs.append(np.array(backend.to_numpy(out)[:count]))
        start += count
    return np.concatenate(outs)


def sequence(case: str, rows: int, seed: int = 0):
    heads, kv_heads, size, _, _ = CASES[case]
    return tuple(noise(rows, n * size, seed=seed + i) for i, n in enumerate((heads, kv_heads, kv_heads)))


@pytest.mark.parametrize("case", CASES)
def test_attention_agrees_with_the_reference(ops, reference, case: str) -> None:
    q, k, v = sequence(case, 203)
    found = attend(ops, ops.rows, case, q, k, v, [203])
    rounded = [torch.from_numpy(t).bfloat16().float().numpy() for t in (q, k, v)]
    expected = attend(reference, torch.from_numpy, case, *rounded, [203])
    # The weights are rounded to bf16 before they meet V.
    np.testing.assert_allclose(found, expected, atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_attention_in_pieces_changes_no_bit(ops, case: str, pieces: list[int]) -> None:
    q, k, v = sequence(case, 203)
    whole = attend(ops, ops.rows, case, q, k, v, [203])
    assert_same(attend(ops, ops.rows, case, q, k, v, pieces), whole)


def as_codes(x: np.ndarray, head_dim: int) -> np.ndarray:
    """What int8 pages make of K or V: 127 steps to a position's highest magnitude in a head."""
    heads = x.reshape(len(x), -1, head_dim)
    most = np.abs(heads).max(axis=2, keepdims=True)
    codes = np.rint(heads * (np.float32(127.0) / most))
    return (codes * (most / np.float32(127.0))).reshape(x.shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_attention_over_coded_pages_agrees_with_the_reference(coded, reference, case: str) -> None:
    q, k, v = sequence(case, 203)
    found = attend(coded, coded.rows, case, q, k, v, [203])
    q = torch.from_numpy(q).bfloat16().float().numpy()
    size = CASES[case][2]
    expected = attend(reference, torch.from_numpy, case, q, as_codes(k, size), as_codes(v, size), [203])
    np.testing.assert_allclose(found, expected, atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize("case", CASES)
def test_attention_over_coded_pages_in_pieces_changes_no_bit(coded, monkeypatch, case: str) -> None:
    q, k, v = sequence(case, 203)
    whole = attend(coded, coded.rows, case, q, k, v, [203])
    fresh = coded.kv_pages

    def used(layers: KVGroup, num_pages: int):
        pages = fresh(layers, num_pages)
        pages.array[...] = 0xFF  # scales are NaN
        return pages

    monkeypatch.setattr(coded, "kv_pages", used)
    for pieces in PIECES.values():
        assert_same(attend(coded, coded.rows, case, q, k, v, pieces), whole)


@pytest.mark.parametrize("case", CASES)
def test_attention_in_company_changes_no_bit(ops, case: str) -> None:
    heads, kv_heads, size, window, softcap = CASES[case]
    layers = group(kv_heads, size, window)
    lengths = (130, 1, 64, 77)
    sequences = [sequence(case, n, seed=10 * i) for i, n in enumerate(lengths)]
    alone = [attend(ops, ops.rows, case, *s, [len(s[0])]) for s in sequences]
    pages = ops.kv_pages(layers, 12)
    held = iter(np.random.default_rng(1).permutation(12).tolist())
    spans, row = [], 0
    for n in lengths:
        own = tuple(next(held) for _ in range(-(-n // PAGE_SIZE)))
        spans.append(KVSpan(row=row, num_rows=n, start=0, pages=own))
        row += n
    fused = [ops.rows(np.concatenate([s[i] for s in sequences])) for i in range(3)]
    plan = ops.attention_plan(layers, heads, spans, row)
    out = ops.to_numpy(ops.attention(*fused, pages, 1, plan, scale=size**-0.5, softcap=softcap))
    assert_same(out, np.concatenate(alone))


def test_a_page_given_back_inside_the_reach_of_a_row_is_refused(ops) -> None:
    layers = group(2, 64, window=70)
    held = (-1, -1, 4, 5)
    ops.attention_plan(layers, 4, [KVSpan(row=0, num_rows=1, start=199, pages=held)], 1)
    with pytest.raises(InternalError):
        ops.attention_plan(layers, 4, [KVSpan(row=0, num_rows=1, start=190, pages=held)], 1)
    with pytest.raises(InternalError):
        ops.attention_plan(layers, 4, [KVSpan(row=0, num_rows=1, start=256, pages=held)], 1)


@pytest.mark.parametrize("fill", [0xFF, 0x7F], ids=["nan", "large"])
@pytest.mark.parametrize("pieces", [[203], *PIECES.values()], ids=["whole", *PIECES])
def test_what_a_former_owner_left_in_a_page_changes_no_bit(ops, monkeypatch, fill: int, pieces) -> None:
    q, k, v = sequence("gqa", 203)
    clean = attend(ops, ops.rows, "gqa", q, k, v, [203])
    fresh = ops.kv_pages

    def used(layers: KVGroup, num_pages: int):
        pages = fresh(layers, num_pages)
        pages.array[...] = fill
        ops.zero_pages(pages, range(num_pages))
        return pages

    monkeypatch.setattr(ops, "kv_pages", used)
    assert_same(attend(ops, ops.rows, "gqa", q, k, v, pieces), clean)


def test_a_copied_page_holds_the_same(ops) -> None:
    pages = ops.kv_pages(group(2, 32), 3)
    pages.array[0] = 7
    ops.copy_page(pages, 0, 2)
    assert (pages.array[2] == 7).all()
    assert not pages.array[1].any()


def test_memory_of_dropped_activations_is_reused(ops) -> None:
    for _ in range(3):
        x = ops.rows(noise(50, 96))
        for _ in range(20):
            x = ops.add(x, x)
        before = ops._arena.num_bytes
    assert ops._arena.num_bytes == before


def test_a_view_keeps_its_memory(ops) -> None:
    x = ops.to_numpy(ops.rows(noise(50, 96)))[3:5]
    kept = x.copy()
    ops.rows(np.zeros((50, 96), dtype=np.float32))
    assert_same(x, kept)
