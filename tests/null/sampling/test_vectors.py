"""The numbers printed in docs/design/0002-sampler.md: whoever ports the sampler must reproduce them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.null.sampling import literal
from xllm.engine.plan import SampleOp
from xllm.engine.sampling import Sampler
from xllm.engine.sampling.exactmath import MAX_NOISE, MIN_NOISE, gumbel, ln, weights
from xllm.engine.sampling.philox import philox4x32, token_words, vocabulary_words
from xllm.types import SamplingParams

ADR = Path(__file__).parents[3] / "docs" / "design" / "0002-sampler.md"
ALL = 0xFFFFFFFF

# Known-answer vectors that Random123 publishes for philox4x32-10: counter, key, block.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# seed, choice, offset, token id, word, noise.
NOISE = [
    (0, 0, 0, 0, 0x6627E8D5, "0x1.5b6c7ac8fef5cp-4"),
    (0, 0, 0, 1, 0xE169C58D, "0x1.07e48418102fbp+1"),
    (1, 0, 0, 0, 0xE3E80670, "0x1.1377353634645p+1"),
    (0, 1, 0, 0, 0x844515E1, "0x1.a8f89495d0631p-2"),
    (0, 0, 1, 0, 0x6AD0C5EC, "0x1.13a3ebe49d162p-3"),
    (-1, 2, 17, 49151, 0x38D8F140, "-0x1.a278e23022343p-2"),
    (9223372036854775807, 15, 4095, 262143, 0x2C853E1A, "-0x1.1e4c2370f5537p-1"),
    (-9223372036854775808, 0, 131071, 128000, 0x6CAB5812, "0x1.3c5b7fa341231p-3"),
]

# params, offset → token per choice (0, 1, 2) with seed 2026; the row is `adr_row()`.
DRAWS: list[tuple[dict[str, float], int, tuple[int, int, int]]] = [
    ({"temperature": 0.0}, 0, (765, 765, 765)),
    ({"temperature": 0.0}, 1, (765, 765, 765)),
    ({"temperature": 1.0}, 0, (409, 541, 475)),
    ({"temperature": 1.0}, 1, (53, 442, 376)),
    ({"temperature": 0.7}, 0, (409, 541, 475)),
    ({"temperature": 0.7}, 1, (53, 442, 376)),
    ({"temperature": 2.0}, 0, (409, 541, 475)),
    ({"temperature": 2.0}, 1, (53, 583, 376)),
    ({"temperature": 1.0, "top_k": 20}, 0, (409, 554, 66)),
    ({"temperature": 1.0, "top_k": 20}, 1, (409, 277, 376)),
    ({"temperature": 1.0, "top_p": 0.9}, 0, (409, 541, 475)),
    ({"temperature": 1.0, "top_p": 0.9}, 1, (53, 442, 376)),
    ({"temperature": 1.5, "min_p": 0.1}, 0, (409, 541, 475)),
    ({"temperature": 1.5, "min_p": 0.1}, 1, (53, 442, 376)),
    ({"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02}, 0, (409, 541, 475)),
    ({"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02}, 1, (53, 442, 376)),
]

# logit below the top → weight.
WEIGHTS = [
    (0.0, 17592186044416),
    (0.25, 13700808260851),
    (1.0, 6471803554423),
    (10.0, 798684009),
    (30.0, 1),
    (30.5, 0),
    (31.0, 0),
]


def adr_row() -> np.ndarray:
    """Width 1000: logit i = ((i · 7919) mod 1009) / 64, exact in float32."""
    return np.array([(i * 7919 % 1009) / 64 for i in range(1000)], dtype=np.float32)


@pytest.mark.parametrize(("counter", "key", "block"), PHILOX)
def test_philox_gives_the_published_blocks(
    counter: tuple[int, int, int, int], key: tuple[int, int], block: tuple[int, int, int, int]
) -> None:
    found = philox4x32(np.array([counter[0]], dtype=np.uint64), *counter[1:], key)
    assert tuple(int(v) for v in found[:, 0]) == block


@pytest.mark.parametrize(("seed", "choice", "offset", "token", "word", "noise"), NOISE)
def test_words_and_noise_are_those_of_the_adr(
    seed: int, choice: int, offset: int, token: int, word: int, noise: str
) -> None:
    words = token_words(seed, choice, offset, np.array([token]))
    assert int(words[0]) == word
    assert float(gumbel(words)[0]).hex() == noise


@pytest.mark.parametrize(("params", "offset", "tokens"), DRAWS)
def test_draws_are_those_of_the_adr(
    params: dict[str, float], offset: int, tokens: tuple[int, int, int]
) -> None:
    op = SampleOp(params=SamplingParams(**params), seed=2026, choices=(0, 1, 2), offset=offset)  # type: ignore[arg-type]
    assert tuple(c.tokens[0].token_id for c in Sampler().sample(adr_row(), op)) == tokens
    assert tuple(literal.sample(adr_row(), op)) == tokens


@pytest.mark.parametrize(("below", "weight"), WEIGHTS)
def test_weights_are_those_of_the_adr(below: float, weight: int) -> None:
    assert int(weights(np.array([-below], dtype=np.float32), np.float32(0))[0]) == weight


def test_the_adr_prints_these_vectors() -> None:
    text = ADR.read_text(encoding="utf-8")
    for seed, choice, offset, token, word, noise in NOISE:
        assert f"| {seed} | {choice} | {offset} | {token} | 0x{word:08x} | {noise} |" in text
    for params, offset, tokens in DRAWS:
        spelled = ", ".join(f"{k} {v}" for k, v in params.items())
        assert f"| {spelled} | {offset} | {', '.join(map(str, tokens))} |" in text
    for below, weight in WEIGHTS:
        assert f"| {below} | {weight} |" in text


def test_the_adr_prints_the_polynomial_of_the_code() -> None:
    text = ADR.read_text(encoding="utf-8")
    for coefficient in literal.EXP2:
        assert coefficient.hex() in re.findall(r"0x1\.[0-9a-f]{13}p[+-]\d+", text)


def test_whole_vocabulary_words_equal_single_ones() -> None:
    for width in (1, 2, 3, 4, 5, 101, 4 * 8192, 4 * 8192 + 1, 70_000):
        whole = vocabulary_words(-5, 3, 9, width)
        assert np.array_equal(whole, token_words(-5, 3, 9, np.arange(width)))


def test_ln_and_weights_are_close_to_libm() -> None:
    x = np.concatenate([(2.0 * np.arange(1, 2**16) + 1) * 2.0**-33, np.linspace(1e-3, 25.0, 4001)])
    assert np.all(np.abs(ln(x) - np.log(x)) <= 2e-11 * (1 + np.abs(np.log(x))))
    logits = np.linspace(-30, 0, 5001).astype(np.float32)
    exact = np.exp(logits.astype(np.float64)) * 2**44
    assert np.all(np.abs(weights(logits, np.float32(0)) - exact) <= 1 + 8e-9 * exact)


def test_noise_stays_within_its_stated_bounds() -> None:
    low, high = gumbel(np.array([0, ALL], dtype=np.uint32))
    assert MIN_NOISE < low < high < MAX_NOISE
    assert low == pytest.approx(-math.log(33 * math.log(2)), abs=1e-9)
    assert high == pytest.approx(33 * math.log(2), abs=1e-9)
