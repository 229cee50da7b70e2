"""The sampler once more, written token by token from the ADR in plain Python: slow, and nothing shared.

Only float32 rounding comes from numpy. Used to check the fast one bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xllm.engine.plan import SampleOp

ONE = 2**44
LN_2, LOG2_E, SQRT_HALF = (
    float.fromhex(h) for h in ("0x1.62e42fefa39efp-1", "0x1.71547652b82fep+0", "0x1.6a09e667f3bcdp-1")
)
EXP2 = [
    float.fromhex(h)
    for h in (
        "0x1.0000000000000p+0", "0x1.62e42fefa39efp-1", "0x1.ebfbdff82c58fp-3", "0x1.c6b08d704a0c0p-5",
        "0x1.3b2ab6fba4e77p-7", "0x1.5d87fe78a6731p-10", "0x1.430912f86c787p-13", "0x1.ffcbfc588b0c7p-17",
    )
]  # fmt: skip


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c, (k0, k1), low = list(counter), key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def ln(x: float) -> float:
    m, e = math.frexp(x)
    if m < SQRT_HALF:
        m, e = m + m, e - 1
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    t = z * (1.0 / 11.0)
    for d in (9.0, 7.0, 5.0, 3.0):
        t = (t + 1.0 / d) * z
    return e * LN_2 + (s + s) * (t + 1.0)


def noise(seed: int, choice: int, offset: int, token: int) -> float:
    bits = seed % 2**64
    word = philox((token // 4, offset, choice, 0), (bits % 2**32, bits // 2**32))[token % 4]
    return -ln(-ln((2 * word + 1) / 2**33))


def weight(x: float, top: float) -> int:
    r = max(x - top, -44.0) * LOG2_E
    n = float(round(r))
    r -= n
    p = r * EXP2[7]
    for c in EXP2[6:0:-1]:
        p = (p + c) * r
    return int((p + EXP2[0]) * ONE) >> int(-n)


def shaped(logits: np.ndarray, op: SampleOp) -> list[np.float32]:
    """After bias, masks and penalties. Each operation is one float32 rounding."""
    p, x = op.params, [np.float32(v) for v in logits]
    for token, bias in (p.logit_bias or {}).items():
        x[token] = x[token] + np.float32(bias)
    banned = set(op.banned)
    for word in p.bad_words_token_ids:
        prefix = word[:-1]
        if op.output[len(op.output) - len(prefix) :] == prefix:
            banned.add(word[-1])
    for t in range(len(x)):
        if t in banned or (p.allowed_token_ids is not None and t not in p.allowed_token_ids):
            x[t] = np.float32(-np.inf)
    for t in sorted(set(op.prompt) | set(op.output)):
        factor = np.float32(p.repetition_penalty)
        x[t] = x[t] / factor if x[t] > 0 else x[t] * factor
        if count := op.output.count(t):
            x[t] = x[t] - np.float32(p.frequency_penalty) * np.float32(count)
            x[t] = x[t] - np.float32(p.presence_penalty)
    return x


def survivors(y: Sequence[float], op: SampleOp) -> list[int]:
    """Token ids that top_k, top_p and min_p leave."""
    p = op.params
    ids = sorted(range(len(y)), key=lambda t: (-y[t], t))
    if p.top_k > 0:
        ids = ids[: p.top_k]
    top = y[ids[0]]
    w = [weight(y[t], top) for t in ids]
    if p.top_p < 1.0:
        target = p.top_p * float(sum(w))
        ids = [t for i, t in enumerate(ids) if float(sum(w[:i])) < target]
    if p.min_p > 0.0:
        ids = [t for t in ids if weight(y[t], top) >= p.min_p * ONE]
    return ids


def sample(logits: np.ndarray, op: SampleOp) -> list[int]:
    x = shaped(logits, op)
    if op.params.temperature < 1e-5:
        return [min(range(len(x)), key=lambda t: (-x[t], t))] * len(op.choices)
    y = [float(v / np.float32(op.params.temperature)) for v in x]
    ids = survivors(y, op)
    return [
        min(ids, key=lambda t, c=choice: (-(y[t] + noise(op.seed, c, op.offset, t)), t))
        for choice in op.choices
    ]
