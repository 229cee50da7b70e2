"""Reads the head of a GGUF file: metadata and tensor table, every number checked against the file.

Own reader rather than the `gguf` library's, since files come from strangers and this one refuses
before it allocates. No meaning is given to keys or names here.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from xllm.errors import ConfigError

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 14
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_LEN = 1 << 23
MAX_DIMS = 4

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GgufError(ConfigError):
    """The file is not a GGUF file that can be read safely."""

    default_code = "invalid_model_file"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is in numpy order (slowest first); `start`/`num_bytes` lie inside the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(data: mmap.mmap | bytes, path: Path) -> GgufHeader:
    """Parse and check the head of a whole file in `data`. Raises GgufError naming the file."""
    try:
        return _Reader(data).header()
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise GgufError(f"{path.name}: the GGUF head is cut off or damaged") from error
    except GgufError as error:
        raise GgufError(f"{path.name}: {error.message}") from error


class _Reader:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if bytes(self._data[:4]) != b"GGUF":
            raise GgufError("not a GGUF file")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise GgufError("only GGUF versions 2 and 3, little-endian, are supported")
        num_tensors = self._bounded("<Q", MAX_TENSORS, "tensors")
        num_keys = self._bounded("<Q", MAX_KEYS, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise GgufError("a metadata key occurs twice")
            metadata[key] = self._value(self._scalar("<I"))
        raw = [self._tensor() for _ in range(num_tensors)]
        return GgufHeader(metadata, self._placed(raw, metadata))

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _bounded(self, form: str, limit: int, what: str) -> int:
        value: int = self._scalar(form)
        if value > limit:
            raise GgufError(f"more than {limit} {what}")
        return value

    def _string(self) -> str:
        size = self._bounded("<Q", MAX_STRING_BYTES, "bytes in a string")
        end = self._at + size
        if end > len(self._data):
            raise GgufError("a string goes beyond the end of the file")
        text = bytes(self._data[self._at : end]).decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        raise GgufError("a metadata value has an unknown type")

    def _array(self) -> list[Any]:
        kind = self._scalar("<I")
        length = self._bounded("<Q", MAX_ARRAY_LEN, "values in an array")
        if kind == _STRING:
            return [self._string() for _ in range(length)]
        if kind not in _SCALARS:
            raise GgufError("arrays of arrays are not supported")
        form = f"<{length}{_SCALARS[kind][1]}"
        if self._at + struct.calcsize(form) > len(self._data):
            raise GgufError("an array goes beyond the end of the file")
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return list(values)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._bounded("<I", MAX_DIMS, "dimensions")
        dims = [self._scalar("<Q") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")

    def _placed(
        self, raw: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise GgufError("the alignment is not a power of two between 8 and 65536")
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in raw:
            if name in tensors:
                raise GgufError("a tensor name occurs twice")
            info = _tensor_info(shape, kind, base + offset)
            if offset % alignment or info.start + info.num_bytes > len(self._data):
                raise GgufError("a tensor lies outside the file")
            tensors[name] = info
        return tensors


def _tensor_info(shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
    try:
        quant = GGMLQuantizationType(kind)
    except ValueError as error:
        raise GgufError("a tensor has an unknown type") from error
    block_len, block_bytes = GGML_QUANT_SIZES[quant]
    # Python's integers do not overflow; the product is compared with the file's size by the caller.
    num_values = 1
    for dim in shape:
        num_values *= dim
    if not shape or num_values == 0 or shape[-1] % block_len:
        raise GgufError("a tensor's shape does not fit its type")
    return TensorInfo(shape, quant, start, num_values // block_len * block_bytes)
