"""Rotary frequencies and tables, with linear, Llama 3 and YaRN scaling.

Computed in float64 and rounded once to float32. Sources: RoFormer (arXiv 2104.09864), YaRN (2309.00071,
§3 "NTK-by-parts" and the attention temperature), the published Llama 3.1 rule.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from xllm.arch import ArchConfig, RopeScaling
from xllm.engine.kernels.ops import F32
from xllm.engine.model.definition import RopeArrays
from xllm.errors import ConfigError

F64 = npt.NDArray[np.float64]


def rope_arrays(
    head_dim: int, theta: float, num_positions: int, scaling: RopeScaling | None, factors: F32 | None = None
) -> RopeArrays:
    """cos and sin (num_positions, head_dim/2). `factors` (head_dim/2,) divide the frequencies: the form in
    which GGUF files carry Llama 3 scaling; they take the place of `scaling`."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    magnitude = 1.0
    if factors is not None:
        frequencies = frequencies / factors.astype(np.float64)
    elif scaling is not None:
        frequencies, magnitude = _scaled(frequencies, scaling, head_dim, theta)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * frequencies[None, :]
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    return cos.astype(np.float32), sin.astype(np.float32)


def arch_ropes(arch: ArchConfig, num_positions: int, factors: F32 | None) -> dict[str, RopeArrays]:
    """The table "full", and "local" (never scaled) if windowed layers have a base of their own."""
    full = rope_arrays(arch.head_dim, arch.rope_theta, num_positions, arch.rope_scaling, factors)
    if arch.local_rope_theta is None:
        return {"full": full}
    return {"full": full, "local": rope_arrays(arch.head_dim, arch.local_rope_theta, num_positions, None)}


def _scaled(frequencies: F64, scaling: RopeScaling, head_dim: int, theta: float) -> tuple[F64, float]:
    if scaling.kind == "default":
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, head_dim, theta), _yarn_magnitude(scaling)
    raise ConfigError(f"rope_scaling: kind {scaling.kind!r} is not supported; linear, llama3 and yarn are")


def _llama3(frequencies: F64, scaling: RopeScaling) -> F64:
    """Long waves are stretched by `factor`, short ones kept, those between blended by wavelength."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return _stretched(frequencies, kept, scaling.factor)


def _yarn(frequencies: F64, scaling: RopeScaling, head_dim: int, theta: float) -> F64:
    """Dimensions that turn often over the trained context are kept, those that turn less than once
    are interpolated, with a linear ramp over the dimension's index between."""

    def index_of(turns: float) -> float:
        wave = scaling.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    kept = 1.0 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return _stretched(frequencies, kept, scaling.factor)


def _stretched(frequencies: F64, kept: F64, factor: float) -> F64:
    """The part `kept` of each frequency as it is, the rest divided by `factor`."""
    blended: F64 = frequencies * (kept + (1.0 - kept) / factor)
    return blended


def _yarn_magnitude(scaling: RopeScaling) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1.0 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
