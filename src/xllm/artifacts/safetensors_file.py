"""One safetensors file, mapped into memory after its header has been checked in full.

Own reader: the format is a JSON table before raw bytes, and every number in it is a stranger's.
Knows nothing of models.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xllm.artifacts.source import Array
from xllm.errors import ConfigError

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 1 << 16
MAX_DIMS = 8

_LENGTH = struct.Struct("<Q")

# dtype in the file → (our name, numpy code); bfloat16 travels as its bits.
READABLE = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
_ITEM_BYTES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_BYTES |= {"F32": 4, "F16": 2, "BF16": 2}


class SafetensorsError(ConfigError):
    """The file is not a safetensors file that can be read safely."""

    default_code = "invalid_model_file"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`start` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """Read-only view of one file. Arrays returned by `read` are views that keep the mapping alive."""

    def __init__(self, path: Path) -> None:
        """Raises SafetensorsError naming the file."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.stat = os.fstat(file.fileno())
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise SafetensorsError(f"{path.name} cannot be opened or is empty") from error
        try:
            self.tensors: Mapping[str, StoredTensor] = _table(self._data)
        except SafetensorsError as error:
            raise SafetensorsError(f"{path.name}: {error.message}") from error

    def release(self) -> None:
        """Unmap the pages that were read: they count as this process's memory, wanted or not."""
        self._data.madvise(mmap.MADV_DONTNEED)

    def read(self, name: str) -> tuple[str, Array]:
        """(float32 | float16 | bfloat16 bits as uint16, array). Raises SafetensorsError for other types."""
        stored = self.tensors[name]
        if stored.dtype not in READABLE:
            raise SafetensorsError(f"{self.path.name}: tensors of type {stored.dtype} are not supported")
        dtype, code = READABLE[stored.dtype]
        raw = np.frombuffer(self._data, dtype=np.uint8, count=stored.num_bytes, offset=stored.start)
        return dtype, raw.view(code).reshape(stored.shape)


def _table(data: mmap.mmap) -> dict[str, StoredTensor]:
    if len(data) < _LENGTH.size:
        raise SafetensorsError("not a safetensors file")
    (size,) = _LENGTH.unpack_from(data, 0)
    base = _LENGTH.size + size
    if size > MAX_HEADER_BYTES or base > len(data):
        raise SafetensorsError(f"the header is longer than the file or than {MAX_HEADER_BYTES} bytes")
    try:
        header = json.loads(bytes(data[_LENGTH.size : base]), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError("the header is not valid JSON, or repeats a name") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise SafetensorsError(f"the header is not an object of at most {MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    tensors = {name: _stored(entry, base, len(data)) for name, entry in header.items()}
    _check_disjoint(tensors)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _stored(entry: Any, base: int, file_bytes: int) -> StoredTensor:
    dtype, shape, offsets = _fields(entry)
    num_bytes = _ITEM_BYTES[dtype]
    for dim in shape:
        num_bytes *= dim
    begin, end = offsets
    if not 0 <= begin <= end <= file_bytes - base or end - begin != num_bytes:
        raise SafetensorsError("a tensor lies outside the file or does not fit its shape")
    return StoredTensor(dtype, tuple(shape), base + begin, num_bytes)


def _fields(entry: Any) -> tuple[str, list[int], list[int]]:
    if not isinstance(entry, dict):
        raise SafetensorsError("a tensor's entry is not an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise SafetensorsError("a tensor has a type that is not supported")
    shape, offsets = _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    if shape is None or len(shape) > MAX_DIMS or offsets is None or len(offsets) != 2:
        raise SafetensorsError("a tensor's shape or offsets are damaged")
    return dtype, shape, offsets


def _naturals(values: Any) -> list[int] | None:
    if isinstance(values, list) and all(type(v) is int and v >= 0 for v in values):
        return values
    return None


def _check_disjoint(tensors: Mapping[str, StoredTensor]) -> None:
    end = 0
    for stored in sorted(tensors.values(), key=lambda t: (t.start, t.num_bytes)):
        if stored.start < end:
            raise SafetensorsError("two tensors overlap")
        end = stored.start + stored.num_bytes
