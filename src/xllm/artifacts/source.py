"""What a resolved model offers: architecture, tensors, text assets, defaults, digest.

Protocols and the dummy weights only; formats are in `gguf_file` and `hf_dir`. No torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from xllm.arch import ArchConfig
from xllm.artifacts.shapes import parameter_shapes
from xllm.codes import GroupCodes
from xllm.errors import ConfigError

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]

GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The sampling defaults a model may bring."""


class TensorSource(Protocol):
    """Tensors under their Hugging Face names, in Hugging Face's layout and conventions."""

    def identity(self) -> str:
        """Names these very bytes on this machine, for caches; "" when nothing vouches for them."""

    def release(self) -> None:
        """Give back the memory that reading took; reading again is allowed."""

    def names(self) -> Sequence[str]:
        """All parameter names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading data. Raises ConfigError for an unknown name."""

    def load_f32(self, name: str) -> FloatArray:
        """The tensor as a fresh or read-only float32 array."""

    def load_raw(self, name: str) -> tuple[str, Array]:
        """(dtype, array) as stored: float32, float16, or bfloat16 as uint16 bits.

        Block-quantised tensors come dequantised as float32.
        """

    def load_codes(self, name: str) -> GroupCodes | None:
        """A matrix stored as codes in groups of 32, exactly as stored; None for any other tensor."""

    def code_kind(self, name: str) -> tuple[int, int] | None:
        """(bits, columns of a group) of what `load_codes` gives, without reading data."""


class ModelSource(Protocol):
    """A model found on this machine. Implementations are frozen; files are read on demand."""

    @property
    def model_id(self) -> str:
        """The name it was asked for by, without directories."""

    @property
    def kind(self) -> str:
        """gguf, safetensors or dummy."""

    @property
    def path(self) -> Path: ...

    def arch(self) -> ArchConfig:
        """Raises ConfigError for an architecture or setting that is not supported."""

    def tensors(self) -> TensorSource: ...

    def assets(self) -> dict[str, bytes]:
        """ "tokenizer" (tokenizers JSON), "text_config" (JSON), and "chat_template" if it has one."""

    def generation_config(self) -> dict[str, float | int]:
        """Sampling defaults among GENERATION_KEYS that the model brings."""

    def weights_digest(self) -> str:
        """`<method>:<hex>`. Methods: pinned-sha256 (whole file, checked when it was pulled),
        sampled-sha256 (sizes, headers and 64 spread blocks of every weight file: cheap, and different
        for different trainings of one shape, but no protection against a forger), dummy."""


@dataclass(frozen=True, slots=True)
class DummySource:
    """Random weights of the right shapes: normal, std 0.02, seeded by (seed, name); norms near neutral."""

    config: ArchConfig
    seed: int = 0

    def identity(self) -> str:
        return ""

    def release(self) -> None:
        """Nothing is held."""

    def names(self) -> Sequence[str]:
        return sorted(parameter_shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = parameter_shapes(self.config)
        if name not in shapes:
            raise ConfigError(f"the model has no tensor {name}")
        return shapes[name]

    def load_f32(self, name: str) -> FloatArray:
        shape = self.shape(name)
        generator = np.random.default_rng((self.seed, zlib.crc32(name.encode())))
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        # Gemma stores w and multiplies by 1 + w; everyone else stores the factor.
        if name.endswith("norm.weight") and self.config.name != "gemma3":
            values += np.float32(1.0)
        return values

    def load_codes(self, name: str) -> GroupCodes | None:
        return None

    def code_kind(self, name: str) -> tuple[int, int] | None:
        return None

    def load_raw(self, name: str) -> tuple[str, Array]:
        return "float32", self.load_f32(name)


@dataclass(frozen=True, slots=True)
class DummyModel:
    """A model whose weights are replaced by `DummySource`; all else is the original's."""

    original: ModelSource
    seed: int = 0

    @property
    def model_id(self) -> str:
        return self.original.model_id

    @property
    def kind(self) -> str:
        return "dummy"

    @property
    def path(self) -> Path:
        return self.original.path

    def arch(self) -> ArchConfig:
        return self.original.arch()

    def tensors(self) -> TensorSource:
        return DummySource(self.original.arch(), self.seed)

    def assets(self) -> dict[str, bytes]:
        return self.original.assets()

    def generation_config(self) -> dict[str, float | int]:
        return self.original.generation_config()

    def weights_digest(self) -> str:
        return f"dummy:{self.seed}"


def sampling_defaults(values: Mapping[str, object]) -> dict[str, float | int]:
    """The entries of `values` that are sampling defaults and numbers."""
    found = {key: values.get(key) for key in GENERATION_KEYS}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
