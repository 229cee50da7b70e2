"""GGUF blocks as codes, scales and mins, exactly: for kernels that compute on the codes.

Formats with groups of 32 columns (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K), and Q6_K with groups of 16;
layouts are in the GGUF specification. Dequantising to float32 is the `gguf` library's.
Q2_K and Q3_K are read as values only: with 8 bits a code and scales per 16 they would take 10 to 12 of
bf16's 16 bits, and cost the accuracy of 8-bit activations besides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Quant

from xllm.codes import GROUP_SIZE, HALF_GROUP_SIZE, GroupCodes

Bytes = npt.NDArray[np.uint8]
_Halves = npt.NDArray[np.float32]
_Split = tuple[int, npt.NDArray[np.generic], npt.NDArray[np.float32], npt.NDArray[np.float32] | None]
"""bits, codes (blocks, columns of a block), scales and mins (blocks, groups of a block)."""


def group_codes(raw: Bytes, kind: Quant, shape: tuple[int, ...]) -> GroupCodes | None:
    """The codes of a matrix of `shape` stored as `raw` bytes; None for formats that are not kept so."""
    if kind not in _FORMATS or len(shape) != 2:
        return None
    block_bytes, split = _FORMATS[kind]
    bits, codes, scales, mins = split(raw.reshape(-1, block_bytes))
    groups = (shape[0], shape[1] // (HALF_GROUP_SIZE if kind == Quant.Q6_K else GROUP_SIZE))
    return GroupCodes(
        bits=bits,
        codes=codes.astype(np.int8).reshape(shape),
        scales=np.ascontiguousarray(scales.reshape(groups)),
        mins=None if mins is None else np.ascontiguousarray(mins.reshape(groups)),
    )


def code_kind(kind: Quant, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(bits, columns of a group) of what `group_codes` gives, without its data."""
    if kind not in _FORMATS or len(shape) != 2:
        return None
    bits = 4 if kind in (Quant.Q4_0, Quant.Q4_1, Quant.Q4_K) else 8
    return bits, HALF_GROUP_SIZE if kind == Quant.Q6_K else GROUP_SIZE


def _halves(blocks: Bytes, at: int) -> _Halves:
    """The float16 at byte `at` of each block, (blocks, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """16 bytes → 32 codes: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """4 bytes → 32 bits, each standing where a code has its fifth bit."""
    return np.left_shift(np.unpackbits(packed, axis=1, bitorder="little"), 4, dtype=np.uint8)


def _q4_0(blocks: Bytes) -> _Split:
    scales = _halves(blocks, 0)
    return 4, _nibbles(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks: Bytes) -> _Split:
    return 4, _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> _Split:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return 8, codes.astype(np.int8) - 16, _halves(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Split:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return 8, codes, _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Bytes) -> _Split:
    return 8, blocks[:, 2:].view(np.int8), _halves(blocks, 0), None


def _k_scales(blocks: Bytes) -> tuple[_Halves, _Halves]:
    """Scales and mins of the 8 groups of a K block: 6 bits each, packed in 12 bytes after two float16."""
    packed = blocks[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], axis=1)
    mins = np.concatenate([high & 63, (rest >> 4) | (high >> 6) << 4], axis=1)
    return _halves(blocks, 0) * scales.astype(np.float32), -(_halves(blocks, 2) * mins.astype(np.float32))


def _k_nibbles(packed: Bytes) -> Bytes:
    """128 bytes → 256 codes: of each 32 bytes the low halves are one group, the high ones the next."""
    chunks = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(-1, 256)


def _q4_k(blocks: Bytes) -> _Split:
    scales, mins = _k_scales(blocks)
    return 4, _k_nibbles(blocks[:, 16:]), scales, mins


def _q5_k(blocks: Bytes) -> _Split:
    scales, mins = _k_scales(blocks)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (blocks[:, None, 16:48] >> shifts & 1).reshape(-1, 256) << 4
    return 8, _k_nibbles(blocks[:, 48:]) | fifth, scales, mins


def _q6_k(blocks: Bytes) -> _Split:
    """Low 4 bits of 128 codes in 64 bytes (low halves, then high), upper 2 bits of them in 32; twice."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    fours = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 256)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    upper = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)
    codes = (fours | upper << 4).astype(np.int8) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    # A float16 times an int8 is exact in float32.
    return 8, codes, _halves(blocks, 208) * scales, None


_FORMATS: dict[Quant, tuple[int, Callable[[Bytes], _Split]]] = {
    Quant.Q4_0: (18, _q4_0),
    Quant.Q4_1: (20, _q4_1),
    Quant.Q5_0: (22, _q5_0),
    Quant.Q5_1: (24, _q5_1),
    Quant.Q8_0: (34, _q8_0),
    Quant.Q4_K: (144, _q4_k),
    Quant.Q5_K: (176, _q5_k),
    Quant.Q6_K: (210, _q6_k),
}
"""Bytes of a block, and how to take it apart."""
