"""Fills a model's declared parameters from a tensor source; checks names and shapes first.

Knows no file format and no architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from xllm.arch import ArchConfig
from xllm.codes import GroupCodes, stack
from xllm.engine.kernels.ops import F32, Backend, Buffer, RopeTable
from xllm.engine.model.definition import LoadedWeights, ModelDefinition, Param
from xllm.errors import ConfigError

ROPE_FACTORS = "rope_freqs.weight"
"""Optional tensor (E/2,): divides the rotary frequencies (how GGUF carries Llama 3 scaling)."""

_PAD = 16
_SHOWN = 5


class Tensors(Protocol):
    """The part of a tensor source that loading needs."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load_f32(self, name: str) -> F32: ...

    def load_codes(self, name: str) -> GroupCodes | None: ...


class Kept(Protocol):
    """Where loaded parameters are kept between starts; a backend's own matter."""

    def handles(
        self, wanted: Mapping[str, tuple[int, ...]], build: Callable[[], dict[str, Buffer]]
    ) -> Mapping[str, Buffer]:
        """The parameters by name; `wanted` tells their shapes without padding, `build` makes them."""


def load_weights(
    model: ModelDefinition,
    arch: ArchConfig,
    source: Tensors,
    backend: Backend,
    num_positions: int,
    kept: Kept | None = None,
) -> LoadedWeights:
    """All parameters as handles of `backend`; rotary tables reach `num_positions`.

    Raises ConfigError naming missing, unexpected or misshapen tensors, before any data is read.
    """
    params = model.parameters(arch)
    _check(params, source, arch)

    def build() -> dict[str, Buffer]:
        return {_name(param): _load(param, source, backend) for param in params}

    wanted = {_name(param): _shape(param) for param in params}
    handles = build() if kept is None else kept.handles(wanted, build)
    top: dict[str, Buffer] = {}
    layers: list[dict[str, Buffer]] = [{} for _ in range(arch.num_layers)]
    for param in params:
        target = top if param.layer is None else layers[param.layer]
        target[param.key] = handles[_name(param)]
    if "head" not in top:
        top["head"] = backend.tied_matrix(top["embed"])
    return LoadedWeights(top=top, layers=layers, ropes=_ropes(model, arch, source, backend, num_positions))


def _ropes(
    model: ModelDefinition, arch: ArchConfig, source: Tensors, backend: Backend, num_positions: int
) -> dict[str, RopeTable]:
    factors = source.load_f32(ROPE_FACTORS) if ROPE_FACTORS in source.names() else None
    return {
        name: RopeTable(cos=backend.vector(cos), sin=backend.vector(sin))
        for name, (cos, sin) in model.ropes(arch, num_positions, factors).items()
    }


def weight_bytes(params: Sequence[Param], dtype_bytes: int) -> int:
    """Bytes the parameters take once loaded."""
    total = 0
    for param in params:
        each = 4 if param.kind == "vector" else dtype_bytes
        total += sum(math.prod(shape) for shape in param.shapes) * each
    return total


def _name(param: Param) -> str:
    return param.key if param.layer is None else f"{param.layer}.{param.key}"


def _shape(param: Param) -> tuple[int, ...]:
    """Of the parameter, without the rows of zeros that `_load` may add."""
    return (sum(shape[0] for shape in param.shapes), *param.shapes[0][1:])


def _load(param: Param, source: Tensors, backend: Backend) -> Buffer:
    if param.kind != "vector" and backend.keeps_codes:
        stored = [source.load_codes(name) for name in param.sources]
        codes = [part for part in stored if part is not None]
        if len(codes) == len(stored):
            return backend.matrix_of_codes(stack(codes))
    parts = [source.load_f32(name) for name in param.sources]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if param.pad_rows and len(values) % _PAD:
        values = np.pad(values, ((0, -len(values) % _PAD), (0, 0)))
    makers = {"matrix": backend.matrix, "table": backend.table, "vector": backend.vector}
    return makers[param.kind](values)


def _check(params: Sequence[Param], source: Tensors, arch: ArchConfig) -> None:
    wanted = {name: shape for p in params for name, shape in zip(p.sources, p.shapes, strict=True)}
    present = set(source.names())
    missing = sorted(set(wanted) - present)
    if missing:
        raise ConfigError(f"model: the weights lack {_listed(missing)} of architecture {arch.name}")
    extra = sorted(n for n in present - set(wanted) if not _ignorable(n))
    if extra:
        raise ConfigError(
            f"model: the weights hold {_listed(extra)}, which architecture {arch.name} does not use; "
            "the configuration does not belong to these weights, or the variant is not supported"
        )
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise ConfigError(f"model: {name} has shape {source.shape(name)}, the configuration says {shape}")


def _ignorable(name: str) -> bool:
    # A tied head may be stored all the same; old checkpoints carry their rotary frequencies.
    return name in ("lm_head.weight", ROPE_FACTORS) or name.endswith("rotary_emb.inv_freq")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
