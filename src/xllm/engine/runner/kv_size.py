"""What a KV page takes in memory, by its layout alone."""

from __future__ import annotations

from xllm.types import KVGroup

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = {"int8": 4}
"""Beside the elements of a position and head, where a KV dtype has scales."""


def page_bytes_of(group: KVGroup, dtype: str) -> int:
    return group.page_bytes(DTYPE_BYTES[dtype], SCALE_BYTES.get(dtype, 0))
