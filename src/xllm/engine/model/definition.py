"""What an architecture declares about itself: its parameters, its rotary tables, its functions.

Values only. Reading tensors is `weights`, choosing an architecture is `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from xllm.arch import ArchConfig
from xllm.engine.kernels.ops import F32, Batch, Buffer, KVPages, Ops, RopeTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One handle of the loaded model: the tensors `sources` (Hugging Face names) below each other.

    `shapes` are those of the sources. A matrix (of a linear) and a table (of an embedding) are
    rounded to the compute dtype, a vector stays float32.
    `layer` None = outside the layers. `pad_rows`: zero rows up to a multiple of 16 (vocabulary).
    """

    key: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Literal["matrix", "table", "vector"]
    layer: int | None = None
    pad_rows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """Handles by key; `ropes` by name. `top["head"]` always exists, tied or not."""

    top: Mapping[str, Buffer]
    layers: Sequence[Mapping[str, Buffer]]
    ropes: Mapping[str, RopeTable]


RopeArrays = tuple[F32, F32]
"""Cosines and sines, (positions, E/2) each."""

Parameters = Callable[[ArchConfig], Sequence[Param]]
Ropes = Callable[[ArchConfig, int, F32 | None], dict[str, RopeArrays]]
"""(arch, positions, factors that divide the frequencies or None) → tables by name."""

Forward = Callable[[Ops, ArchConfig, LoadedWeights, KVPages, Batch], Buffer]
"""→ (R, D): the normed hidden states of the rows that yield logits."""

Head = Callable[[Ops, ArchConfig, LoadedWeights, Buffer], Buffer]
"""(R, D) → (R, ≥ V) logits. Apart from Forward so that wide heads can be run in slices of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefinition:
    """An entry of the registry; `xllm.models` entry points name an object of this type."""

    parameters: Parameters
    ropes: Ropes
    forward: Forward
    head: Head
