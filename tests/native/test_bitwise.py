"""The same bits on every path through the native runner: tiny models of every kind, then SmolLM2."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.native_driver import library, make_native_runner
from tests.reference.runner_driver import Driver
from tests.reference.test_bitwise import ARCHS, assert_same, random_sequence
from xllm.artifacts.resolve import resolve
from xllm.artifacts.source import DummySource
from xllm.engine.kernels.native.isa import ISAS
from xllm.engine.runner.runner import ModelRunner

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")

CLASSES = ("bf16", "w8g32", "w4g32")
NUM_PAGES = 96
PROMPT_LEN = 203
VOCABULARY = 515


@pytest.fixture(scope="module", params=[(a, c) for a in ARCHS for c in CLASSES], ids="-".join)
def made(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def runner(made: tuple[str, str]) -> ModelRunner:
    arch, weight_class = made
    runner = make_native_runner(ARCHS[arch], DummySource(ARCHS[arch]), weight_class, NUM_PAGES)
    assert runner.deterministic
    return runner


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return [int(t) for t in np.random.default_rng(3).integers(0, VOCABULARY, PROMPT_LEN)]


@pytest.fixture(scope="module")
def alone(runner: ModelRunner, prompt: list[int]) -> np.ndarray:
    driver = Driver(runner, NUM_PAGES)
    return driver.prefill(driver.new(prompt)).rows()


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 130])
def test_chunk_borders_change_no_bit(runner, prompt, alone, chunk: int) -> None:
    driver = Driver(runner, NUM_PAGES, seed=chunk)
    assert_same(driver.prefill(driver.new(prompt), chunk).rows(), alone)


@pytest.mark.parametrize("seed", range(4))
def test_random_neighbours_change_no_bit(runner, prompt, alone, seed: int) -> None:
    rng = np.random.default_rng(seed)
    driver = Driver(runner, NUM_PAGES, seed)
    target = driver.new(prompt)
    others = [random_sequence(driver, rng) for _ in range(12)]
    while target.computed < PROMPT_LEN:
        count = min(PROMPT_LEN - target.computed, int(rng.choice([1, 1, 3, 20, 64, 100])))
        work = [(target, count)]
        for i, other in enumerate(others):
            if other.computed == len(other.tokens):
                driver.free(other)
                others[i] = other = random_sequence(driver, rng)
            work.append((other, min(len(other.tokens) - other.computed, int(rng.choice([1, 2, 9, 40])))))
        order = rng.permutation(len(work))[: int(rng.integers(1, len(work) + 1))]
        driver.step(*[work[i] for i in {0, *map(int, order)}])
    assert_same(target.rows(), alone)


def test_a_fork_changes_no_bit(runner, prompt, alone) -> None:
    driver = Driver(runner, NUM_PAGES)
    parent = driver.new(prompt)
    driver.step((parent, 150))
    child = driver.fork(parent, 150)
    child.tokens = list(prompt)
    parent.tokens[150:] = reversed(parent.tokens[150:])
    while child.computed < PROMPT_LEN:
        driver.step((parent, 1), (child, min(9, PROMPT_LEN - child.computed)))
    assert_same(child.rows(), alone[150:])


def test_stale_nan_in_a_page_never_leaks(runner, prompt, alone) -> None:
    driver = Driver(runner, NUM_PAGES)
    for pages in runner._kv.groups:
        pages.array[...] = 0xFF
    try:
        assert_same(driver.prefill(driver.new(prompt), 50).rows(), alone)
    finally:
        for pages in runner._kv.groups:
            pages.array[...] = 0


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_changes_no_bit(made, prompt, alone, threads: int) -> None:
    arch, weight_class = made
    other = make_native_runner(
        ARCHS[arch], DummySource(ARCHS[arch]), weight_class, NUM_PAGES, num_threads=threads
    )
    driver = Driver(other, NUM_PAGES)
    assert_same(driver.prefill(driver.new(prompt), 90).rows(), alone)


@pytest.mark.parametrize("weight_class", [*CLASSES, "w8a8"])
@pytest.mark.parametrize("isa", [i.name for i in ISAS])
def test_every_path_is_exact_within_itself(isa: str, weight_class, prompt) -> None:
    if library(isa) is None:
        pytest.skip(f"the {isa} kernels are not built, or this CPU cannot run them")
    arch = ARCHS["gemma3"]
    runner = make_native_runner(arch, DummySource(arch), weight_class, NUM_PAGES, isa=isa)
    assert runner.deterministic

    one_thread = make_native_runner(
        arch, DummySource(arch), weight_class, NUM_PAGES, isa=isa, num_threads=1, programs=False
    )

    def run(chunk: int | None, on: ModelRunner = runner, company: int = 0) -> np.ndarray:
        driver = Driver(on, NUM_PAGES)
        target = driver.new(prompt)
        others = [driver.new(prompt[20 + i :]) for i in range(company)]
        while target.computed < PROMPT_LEN:
            left = PROMPT_LEN - target.computed
            driver.step(*[(o, 1 + i) for i, o in enumerate(others)], (target, min(left, chunk or left)))
        return target.rows()

    alone = run(None)
    for chunk in (1, 7, 64):
        assert_same(run(chunk), alone)
    assert_same(run(50, company=5), alone)
    assert_same(run(90, on=one_thread), alone)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_kv_in_codes_is_exact_too(arch: str, prompt) -> None:
    made = make_native_runner(ARCHS[arch], DummySource(ARCHS[arch]), "bf16", NUM_PAGES, kv_dtype="int8")

    def run(*counts: int, company: int = 0) -> np.ndarray:
        driver = Driver(made, NUM_PAGES, seed=company)
        target = driver.new(prompt)
        others = [random_sequence(driver, np.random.default_rng(i)) for i in range(company)]
        for count in counts:
            work = [(o, min(2, len(o.tokens) - o.computed)) for o in others if o.computed < len(o.tokens)]
            driver.step(*work, (target, count))
        return target.rows()

    alone = run(PROMPT_LEN)
    assert_same(run(*[7] * 29), alone)
    assert_same(run(150, *[1] * 53, company=9), alone)
    plain = make_native_runner(ARCHS[arch], DummySource(ARCHS[arch]), "bf16", NUM_PAGES)
    driver = Driver(plain, NUM_PAGES)
    bf16 = driver.prefill(driver.new(prompt)).rows()
    assert not np.array_equal(alone, bf16)
    assert plain.kv_layout.digest() != made.kv_layout.digest()


@pytest.mark.slow
@pytest.mark.parametrize("weight_class", CLASSES)
def test_smollm2_one_piece_chunks_decode_and_company_agree_bitwise(smollm2: str, weight_class) -> None:
    source = resolve(smollm2)
    runner = make_native_runner(source.arch(), source.tensors(), weight_class, 300)
    rng = np.random.default_rng(0)
    tokens = [int(t) for t in rng.integers(0, 49_000, 200)]

    def run(*counts: int, company: int = 0) -> np.ndarray:
        driver = Driver(runner, 300)
        target = driver.new(tokens)
        others = [driver.new([int(t) for t in rng.integers(0, 49_000, 250)]) for _ in range(company)]
        for count in counts:
            driver.step(*[(o, 3) for o in others], (target, count))
        return target.rows()

    alone = run(200)
    assert_same(run(*[16] * 12, 8), alone)
    assert_same(run(*[7] * 28, 4), alone)
    assert_same(run(64, 64, 64, 8), alone)
    assert_same(run(150, *[1] * 50), alone)
    assert_same(run(*[1] * 200), alone)
    assert_same(run(100, 50, *[1] * 20, 30, company=63), alone)
