"""A GGUF file as a `ModelSource`: Hugging Face names, layout and conventions on the outside.

Undoes what the GGUF converter did: interleaved rotary order of Llama's q and k, Gemma's norms + 1,
block quantisation (dequantised by the `gguf` library).
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Quant
from gguf.quants import dequantize

from xllm.arch import ArchConfig
from xllm.artifacts.digest import files_identity, sampled_digest
from xllm.artifacts.gguf_arch import arch_from_metadata
from xllm.artifacts.gguf_codes import code_kind, group_codes
from xllm.artifacts.gguf_header import GgufError, GgufHeader, TensorInfo, read_header
from xllm.artifacts.gguf_names import ROPE_FREQS, hf_name
from xllm.artifacts.gguf_tokenizer import assets_from_metadata
from xllm.artifacts.source import Array, FloatArray, TensorSource, sampling_defaults
from xllm.codes import GroupCodes
from xllm.errors import ConfigError

SUPPORTED_TYPES = frozenset(
    {
        Quant.F32,
        Quant.F16,
        Quant.BF16,
        Quant.Q4_0,
        Quant.Q4_1,
        Quant.Q5_0,
        Quant.Q5_1,
        Quant.Q8_0,
        Quant.Q2_K,
        Quant.Q3_K,
        Quant.Q4_K,
        Quant.Q5_K,
        Quant.Q6_K,
    }
)


@dataclass(frozen=True, slots=True)
class _OpenFile:
    path: Path
    stat: os.stat_result
    header: GgufHeader
    data: mmap.mmap


@functools.lru_cache(maxsize=4)
def _open(path: Path, size: int, modified_ns: int) -> _OpenFile:
    """One mapping and one parsed head per file version; size and time are there to tell versions apart."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _OpenFile(path, stat, read_header(data, path), data)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """`pinned_sha256` is the hash of the whole file, if it was checked when the file was stored."""

    path: Path
    model_id: str
    pinned_sha256: str | None = None

    @property
    def kind(self) -> str:
        return "gguf"

    def arch(self) -> ArchConfig:
        opened = self._opened()
        tensors = opened.header.tensors
        freqs = tensors.get(ROPE_FREQS)
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise GgufError(f"{self.path.name}: the file has no token_embd.weight; it is no language model")
        try:
            return arch_from_metadata(
                opened.header.metadata,
                vocab_size=embedding.shape[0],
                tied="output.weight" not in tensors,
                has_bias="blk.0.attn_q.bias" in tensors,
                rope_freqs=None if freqs is None else _values(opened.data, freqs).astype(np.float32),
            )
        except GgufError as error:
            raise GgufError(f"{self.path.name}: {error.message}") from error

    def tensors(self) -> TensorSource:
        return GgufTensors(self._opened(), self.arch())

    def metadata(self) -> dict[str, Any]:
        """All metadata of the file, as stored."""
        return dict(self._opened().header.metadata)

    def assets(self) -> dict[str, bytes]:
        try:
            return assets_from_metadata(self._opened().header.metadata)
        except GgufError as error:
            raise GgufError(f"{self.path.name}: {error.message}") from error

    def generation_config(self) -> dict[str, float | int]:
        prefix = "general.sampling."
        metadata = self._opened().header.metadata
        found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        found["temperature"] = found.get("temp", found.get("temperature"))
        found["repetition_penalty"] = found.get("penalty_repeat")
        return sampling_defaults(found)

    def weights_digest(self) -> str:
        if self.pinned_sha256 is not None:
            return f"pinned-sha256:{self.pinned_sha256}"
        return sampled_digest([self.path])

    def _opened(self) -> _OpenFile:
        try:
            stat = self.path.stat()
            return _open(self.path.resolve(), stat.st_size, stat.st_mtime_ns)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: {self.path.name} cannot be opened or is empty") from error


class GgufTensors:
    """`TensorSource` over an open file. Arrays of load_raw may be views of the mapping."""

    def __init__(self, opened: _OpenFile, arch: ArchConfig) -> None:
        self._opened = opened
        self._data = opened.data
        self._arch = arch
        self._by_name: dict[str, TensorInfo] = {}
        for gguf_name, info in opened.header.tensors.items():
            name = hf_name(gguf_name, arch.name)
            if name is not None:
                self._by_name[name] = info
            elif gguf_name != ROPE_FREQS:
                raise GgufError(f"the file holds a tensor {arch.name} does not have: {gguf_name[:80]}")

    def identity(self) -> str:
        return files_identity([(self._opened.path, self._opened.stat)])

    def release(self) -> None:
        # Pages of the file that are mapped count as this process's memory, wanted or not.
        self._data.madvise(mmap.MADV_DONTNEED)

    def names(self) -> Sequence[str]:
        return sorted(self._by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def load_f32(self, name: str) -> FloatArray:
        dtype, values = self.load_raw(name)
        if dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(values, dtype=np.float32)

    def load_raw(self, name: str) -> tuple[str, Array]:
        info = self._info(name)
        values = self._in_hf_layout(name, _values(self._data, info))
        return {Quant.F16: "float16", Quant.BF16: "bfloat16"}.get(info.type, "float32"), values

    def load_codes(self, name: str) -> GroupCodes | None:
        info = self._info(name)
        codes = group_codes(_raw(self._data, info), info.type, info.shape)
        return None if codes is None else codes.with_rows(lambda rows: self._in_hf_layout(name, rows))

    def code_kind(self, name: str) -> tuple[int, int] | None:
        info = self._info(name)
        return code_kind(info.type, info.shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._by_name:
            raise ConfigError(f"the model has no tensor {name}")
        return self._by_name[name]

    def _in_hf_layout(self, name: str, values: Array) -> Array:
        if self._arch.name == "gemma3" and name.endswith("norm.weight"):
            return (values.astype(np.float32) - np.float32(1.0)).astype(values.dtype)
        if self._arch.name in ("llama", "mistral"):
            if ".q_proj." in name:
                return _half_split_rows(values, self._arch.num_heads)
            if ".k_proj." in name:
                return _half_split_rows(values, self._arch.num_kv_heads)
        return values


def _half_split_rows(values: Array, num_heads: int) -> Array:
    """Rows of each head from interleaved rotary pairs (0, 1), (2, 3) … to halves (0, d/2), (1, d/2 + 1) …"""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _raw(data: mmap.mmap, info: TensorInfo) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8, count=info.num_bytes, offset=info.start)


def _values(data: mmap.mmap, info: TensorInfo) -> Array:
    """The tensor's values: float32, float16, or bfloat16 bits as uint16; quantised ones as float32."""
    if info.type not in SUPPORTED_TYPES:
        names = ", ".join(sorted(t.name for t in SUPPORTED_TYPES))
        raise GgufError(f"tensors of type {info.type.name} are not supported; {names} are")
    raw = _raw(data, info)
    plain = {Quant.F32: "<f4", Quant.F16: "<f2", Quant.BF16: "<u2"}.get(info.type)
    if plain is not None:
        return raw.view(plain).reshape(info.shape)
    rows = raw.reshape(*info.shape[:-1], -1)
    values: FloatArray = dequantize(rows, info.type)
    return values.reshape(info.shape)
