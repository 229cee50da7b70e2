"""The same bits on every path, at the level of the runner: tiny models of every kind, then SmolLM2.

What the scheduler does on top (preemption, prefix hits) is in test_exactness.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.runner_driver import Driver, make_runner
from xllm.arch import ArchConfig
from xllm.artifacts.resolve import resolve
from xllm.artifacts.source import DummySource
from xllm.engine.runner.runner import ModelRunner

torch = pytest.importorskip("torch", reason="the reference platform needs the extra xllm[torch]")

NUM_PAGES = 96
PROMPT_LEN = 203


def tiny(name: str, **changes: object) -> ArchConfig:
    values: dict[str, object] = {
        "name": name,
        "hidden_size": 96,
        "intermediate_size": 176,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 515,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position": 1024,
        "tie_word_embeddings": True,
        "layer_windows": (None, None, None),
    }
    return ArchConfig(**{**values, **changes})  # type: ignore[arg-type]


ARCHS = {
    "llama": tiny("llama"),
    "llama-mha": tiny("llama", num_kv_heads=6, tie_word_embeddings=False),
    "mistral-window": tiny("mistral", layer_windows=(70, 70, 70)),
    "qwen2": tiny("qwen2", attention_bias=True),
    "qwen3": tiny("qwen3"),
    "gemma3": tiny("gemma3", layer_windows=(70, 70, None), local_rope_theta=1000.0, final_logit_softcap=30.0),
}


@pytest.fixture(
    scope="module", params=[(a, d) for a in ARCHS for d in ("float32", "bfloat16", "float16")], ids="-".join
)
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    arch, dtype = request.param
    made = make_runner(ARCHS[arch], DummySource(ARCHS[arch]), dtype, NUM_PAGES)
    if not made.deterministic:
        pytest.skip(f"this CPU has no exact row multiple for {dtype}: it reports deterministic=False")
    return made


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return [int(t) for t in np.random.default_rng(3).integers(0, 515, PROMPT_LEN)]


@pytest.fixture(scope="module")
def alone(runner: ModelRunner, prompt: list[int]) -> np.ndarray:
    driver = Driver(runner, NUM_PAGES)
    return driver.prefill(driver.new(prompt)).rows()


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 130])
def test_chunk_borders_change_no_bit(runner, prompt, alone, chunk: int) -> None:
    driver = Driver(runner, NUM_PAGES, seed=chunk)
    assert_same(driver.prefill(driver.new(prompt), chunk).rows(), alone)


@pytest.mark.parametrize("seed", range(6))
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
            left = len(other.tokens) - other.computed
            work.append((other, min(left, int(rng.choice([1, 2, 9, 40])))))
        order = rng.permutation(len(work))[: int(rng.integers(1, len(work) + 1))]
        driver.step(*[work[i] for i in {0, *map(int, order)}])
    assert_same(target.rows(), alone)


@pytest.mark.parametrize("at", [64, 128, 150])
def test_a_fork_or_prefix_hit_changes_no_bit(runner, prompt, alone, at: int) -> None:
    driver = Driver(runner, NUM_PAGES)
    parent = driver.new(prompt)
    # A window group gives pages back, so the parent stops where the child begins.
    driver.step((parent, at))
    child = driver.fork(parent, at)
    child.tokens = list(prompt)
    parent.tokens[at:] = reversed(parent.tokens[at:])
    while child.computed < PROMPT_LEN:
        driver.step((parent, 1), (child, min(9, PROMPT_LEN - child.computed)))
    assert_same(child.rows(), alone[at:])


def test_stale_nan_in_a_page_never_leaks(runner, prompt, alone) -> None:
    driver = Driver(runner, NUM_PAGES)
    for pages in runner._kv.groups:
        pages.fill_(float("nan"))
    try:
        assert_same(driver.prefill(driver.new(prompt), 50).rows(), alone)
    finally:
        for pages in runner._kv.groups:
            pages.zero_()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_changes_no_bit(runner, prompt, alone, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        driver = Driver(runner, NUM_PAGES)
        assert_same(driver.prefill(driver.new(prompt), 90).rows(), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_smollm2_one_piece_chunks_decode_and_company_agree_bitwise(smollm2: str) -> None:
    source = resolve(smollm2)
    runner = make_runner(source.arch(), source.tensors(), num_pages=NUM_PAGES)
    assert runner.deterministic
    rng = np.random.default_rng(0)
    tokens = [int(t) for t in rng.integers(0, 49_000, 150)]

    def run(*counts: int, company: int = 0) -> np.ndarray:
        driver = Driver(runner, NUM_PAGES)
        target = driver.new(tokens)
        others = [driver.new([int(t) for t in rng.integers(0, 49_000, 60)]) for _ in range(company)]
        for count in counts:
            driver.step(*[(o, 3) for o in others], (target, count))
        return target.rows()

    alone = run(150)
    assert_same(run(*[16] * 9, 6), alone)
    assert_same(run(64, 64, 22), alone)
    assert_same(run(140, *[1] * 10), alone)
    assert_same(run(100, 30, *[1] * 10, 10, company=16), alone)


def random_sequence(driver: Driver, rng: np.random.Generator):
    return driver.new([int(t) for t in rng.integers(0, 515, int(rng.integers(1, 200)))])


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits; says where the first difference is."""
    different = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))
    assert not len(different), f"{len(different)} logits differ, first at (row, token) {tuple(different[0])}"
