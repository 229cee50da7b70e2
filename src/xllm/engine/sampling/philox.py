"""Philox4x32-10 (Salmon et al., SC'11) on numpy arrays: the sampler's counter-based random numbers.

A word depends on (seed, choice, offset, token id) and nothing else, so the noise of any subset of
the vocabulary can be drawn alone and in any order. Integers only; `exactmath` makes noise of them.
"""

from __future__ import annotations

import numpy as np

from xllm.engine.sampling.arrays import I64, U32, U64

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * np.array(
    [[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64
)
_CHUNK = 8192
"""Blocks computed together, so that the intermediates stay in the cache."""

TOKEN_DOMAIN = 0
"""Last counter word of token draws; other values are free for later uses of the same seed."""


def philox4x32(c0: U64, c1: int, c2: int, c3: int, key: tuple[int, int]) -> U32:
    """The blocks of the counters (c0[i], c1, c2, c3), one a column: uint32 (4, N)."""
    # Lanes 0 and 2 are multiplied, lanes 1 and 3 mixed in: as two (2, N) arrays they take half the calls.
    even = np.empty((2, c0.size), dtype=np.uint64)
    odd = np.empty_like(even)
    product = np.empty_like(even)
    even[0], even[1], odd[0], odd[1] = c0, c2, c1, c3
    for round_key in (np.array([[key[0]], [key[1]]], dtype=np.uint64) + _WEYL) & _LOW:
        np.multiply(even, _MULTIPLIERS, out=product)
        np.bitwise_xor(odd, round_key, out=odd)
        np.right_shift(product, _HALF, out=even)
        np.bitwise_xor(even[::-1], odd, out=odd)
        even, odd = odd, even
        np.bitwise_and(product[::-1], _LOW, out=odd)
    blocks = np.empty((4, c0.size), dtype=np.uint32)
    blocks[0::2], blocks[1::2] = even, odd
    return blocks


def seed_key(seed: int) -> tuple[int, int]:
    """The key of a signed 64-bit seed: low and high half of its two's complement."""
    bits = seed & 0xFFFFFFFFFFFFFFFF
    return bits & 0xFFFFFFFF, bits >> 32


def token_words(seed: int, choice: int, offset: int, ids: I64) -> U32:
    """The 32-bit word of each token id, in the order of `ids`."""
    blocks = philox4x32((ids >> 2).astype(np.uint64), offset, choice, TOKEN_DOMAIN, seed_key(seed))
    words: U32 = blocks[ids & 3, np.arange(ids.size)]
    return words


def vocabulary_words(seed: int, choice: int, offset: int, width: int) -> U32:
    """`token_words` of the ids 0 … width − 1, four per block: cheaper beyond a quarter of them."""
    key = seed_key(seed)
    words = np.empty(((width + 3) // 4, 4), dtype=np.uint32)
    for start in range(0, len(words), _CHUNK):
        counters = np.arange(start, min(start + _CHUNK, len(words)), dtype=np.uint64)
        words[start : start + _CHUNK] = philox4x32(counters, offset, choice, TOKEN_DOMAIN, key).T
    return words.reshape(-1)[:width]
