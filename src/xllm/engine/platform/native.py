"""The CPU platform over xLLM's own kernels: no torch, bitwise exact by construction."""

from __future__ import annotations

from dataclasses import replace

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.kernels.native.library import find, open_library
from xllm.engine.kernels.native.ops import HEAD_MULTIPLE, KV_ORDER, NativeOps
from xllm.engine.kernels.native.packing import WeightClass
from xllm.engine.platform.base import BuiltRunner, Platform, TensorSource
from xllm.engine.platform.host import available_bytes, num_cores
from xllm.engine.platform.loading import load_runner, resolve_dtype
from xllm.engine.sampling import Sampler
from xllm.errors import ConfigError

KERNELS_VERSION = "native-1"
"""Raised whenever a change of the kernels may change a bit of the logits."""

_DTYPE = "bfloat16"
_CLASSES: dict[str, tuple[WeightClass, WeightClass]] = {
    "auto": ("bf16", "bf16"),
    "none": ("bf16", "bf16"),
    "w8g32": ("w8g32", "w8g32"),
    # Four bits cost the head most of what they cost in all; it is read once, the layers thirty times.
    "w4g32": ("w4g32", "w8g32"),
}
"""Classes of linears and of embedding with head, for what is not kept as the file's codes."""


class NativePlatform:
    name = "native"

    def why_not(self, config: EngineConfig, arch: ArchConfig) -> tuple[str, ...]:
        reasons = []
        path, why = find()
        if path is None:
            reasons.append(why)
        if config.model.dtype not in ("auto", _DTYPE):
            reasons.append(f"dtype={config.model.dtype}: the native kernels compute in {_DTYPE}")
        if arch.head_dim % HEAD_MULTIPLE:
            reasons.append(f"a head size of {arch.head_dim} is not a multiple of {HEAD_MULTIPLE}")
        return tuple(reasons)

    def create_runner(
        self,
        arch: ArchConfig,
        tensors: TensorSource,
        config: EngineConfig,
        max_model_len: int,
        sampler: Sampler,
    ) -> BuiltRunner:
        path, isa = find()
        if path is None:
            raise ConfigError(f"platform=native: {isa}", param="platform")
        threads = config.platform.num_threads or num_cores()
        why_threads = "as asked" if config.platform.num_threads else "cores this process may use"
        dtype, why_dtype = resolve_dtype(config.model.dtype, _DTYPE, "what the native kernels compute in")
        quantize = config.model.quantize
        ops = NativeOps(open_library(path), threads, *_CLASSES[quantize], keeps_codes=quantize == "auto")
        built = load_runner(
            arch,
            tensors,
            config,
            max_model_len,
            sampler,
            ops=ops,
            dtype=dtype,
            free_bytes=available_bytes,
            numerics=("native", KERNELS_VERSION, isa, f"quantize-{quantize}", f"kv-{dtype}", "tp1"),
            kv_order=KV_ORDER,
            report=(
                f"num_threads={threads}: {why_threads}",
                why_dtype,
                f"kernels={isa}: the best path this CPU can run",
            ),
        )
        sizes = ", ".join(f"{size >> 20} MiB {name}" for name, size in sorted(ops.packed_bytes.items()))
        return replace(built, report=(*built.report, f"packed weights: {sizes} (quantize={quantize})"))


PLATFORM: Platform = NativePlatform()
