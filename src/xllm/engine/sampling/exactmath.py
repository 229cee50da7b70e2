"""exp and ln as this sampler defines them: the same bits on every machine.

Only + − × ÷ and rounding of IEEE doubles, which are correctly rounded everywhere (no fused
multiply-add, no libm, whose results differ between machines), and sums of integers, whose order
does not matter. Accuracy is far beyond what a draw can show (see the ADR); identity is the point.
"""

from __future__ import annotations

import math

import numpy as np

from xllm.engine.sampling.arrays import F32, F64, I64, U32

WEIGHT_BITS = 44
WEIGHT_ONE = 1 << WEIGHT_BITS
"""The weight of the most likely token. 2**18 tokens of this weight still sum to less than 2**63."""

_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
_LN_2 = float.fromhex("0x1.62e42fefa39efp-1")
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
# 2**r = sum of (ln 2)**k / k! · r**k for |r| ≤ 1/2, relative error below 8e-9. Hexadecimal literals, so that
# nobody's libm takes part in the definition.
_EXP2 = tuple(
    float.fromhex(h)
    for h in (
        "0x1.0000000000000p+0",
        "0x1.62e42fefa39efp-1",
        "0x1.ebfbdff82c58fp-3",
        "0x1.c6b08d704a0c0p-5",
        "0x1.3b2ab6fba4e77p-7",
        "0x1.5d87fe78a6731p-10",
        "0x1.430912f86c787p-13",
        "0x1.ffcbfc588b0c7p-17",
    )
)
_BLOCK = 4096
"""Elements per pass, so that the intermediate doubles stay in the cache."""

MIN_NOISE, MAX_NOISE = -3.2, 22.9
"""Bounds of the noise over all 2**32 words: −ln(33 ln 2) = −3.13 and 33 ln 2 = 22.87."""


def weights(logits: F32, top: np.float32) -> I64:
    """floor(2**44 · exp(logits − top)): int64, same shape; 0 from about 30.5 below `top` on.

    `top` is finite and not below any logit; −inf gives 0.
    """
    out = np.empty(logits.size, dtype=np.int64)
    for start in range(0, logits.size, _BLOCK):
        out[start : start + _BLOCK] = _weights(logits[start : start + _BLOCK], top)
    return out


def _weights(logits: F32, top: np.float32) -> I64:
    r = np.subtract(logits, top, dtype=np.float64)
    np.maximum(r, -44.0, out=r)
    r *= _LOG2_E
    n = np.rint(r)
    r -= n
    power = r * _EXP2[7]
    for coefficient in _EXP2[6:0:-1]:
        power += coefficient
        power *= r
    power += _EXP2[0]
    power *= float(WEIGHT_ONE)
    np.negative(n, out=n)
    return power.astype(np.int64) >> n.astype(np.int64)


def ln(x: F64) -> F64:
    """Natural logarithm of positive, normal doubles, error below 2e-11 · |ln x| + 2e-11.

    x = m · 2**e with m in [√½, √2); ln m = 2 artanh(s), s = (m − 1) / (m + 1), as a series in s².
    """
    m, e = np.frexp(x)
    small = m < _SQRT_HALF
    m = np.where(small, m + m, m)
    e = e - small
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * (1.0 / 11.0)
    for divisor in (9.0, 7.0, 5.0, 3.0):
        series += 1.0 / divisor
        series *= z
    series += 1.0
    return np.asarray(e * _LN_2 + (s + s) * series)


def gumbel(words: U32) -> F64:
    """Noise −ln(−ln u) of 32-bit words, u = (2·word + 1) / 2**33: never 0, never 1, exact in a double."""
    u = (words.astype(np.float64) * 2.0 + 1.0) * 2.0**-33
    return -ln(-ln(u))


def log_sum_exp(logits: F32, top: np.float32) -> float:
    """ln Σ exp(logits), the same for a row whatever stands beside it. `top` is the maximum."""
    total = np.array([float(int(weights(logits, top).sum()))])
    return float(top) + (float(ln(total)[0]) - WEIGHT_BITS * _LN_2)


def noise_floor(word: int) -> float:
    """A lower bound of one word's noise by libm, for discarding hopeless candidates; decides nothing."""
    return -math.log(-math.log((2 * word + 1) * 2.0**-33)) - 1e-6
