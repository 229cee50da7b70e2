"""The reference platform: torch on the CPU, bitwise exact where the start-up probe confirms it."""

from __future__ import annotations

import torch

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.fitting import Demand, MemoryPlan, Part, Room, fit
from xllm.engine.kernels.reference.torch_ops import TorchOps, kept_on_cpu
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import weight_bytes
from xllm.engine.platform.base import BuiltRunner, Platform, TensorSource
from xllm.engine.platform.demand import process_parts, torch_demand
from xllm.engine.platform.host import choose_num_threads, isa
from xllm.engine.platform.loading import load_runner, no_native, resolve_dtype
from xllm.engine.platform.room import measure_room
from xllm.engine.sampling import Sampler

ATTENTION_VERSION = "reference-1"
"""Raised whenever a change of the reference backend may change a bit of the logits."""

_TORCH_BYTES = 256 << 20


class CpuPlatform:
    name = "cpu"

    def why_not(self, config: EngineConfig, arch: ArchConfig) -> tuple[str, ...]:
        return no_native(config)

    def plan_memory(
        self, arch: ArchConfig, tensors: TensorSource, config: EngineConfig, max_model_len: int
    ) -> MemoryPlan:
        room = measure_room(asked=config.platform.memory_bytes)

        def demand(changed: EngineConfig, length: int) -> Demand:
            threads, _ = choose_num_threads(changed.platform)
            process = (*process_parts(arch, changed), Part("torch", _TORCH_BYTES, "its libraries"))
            dtype, _ = _dtype(changed, arch, room)
            return torch_demand(arch, changed, length, dtype, threads, process, kept_as=kept_on_cpu(dtype))

        return fit(config, max_model_len, room, demand)

    def create_runner(
        self,
        arch: ArchConfig,
        tensors: TensorSource,
        config: EngineConfig,
        max_model_len: int,
        sampler: Sampler,
    ) -> BuiltRunner:
        threads, why_threads = choose_num_threads(config.platform)
        torch.set_num_threads(threads)
        plan = self.plan_memory(arch, tensors, config, max_model_len)
        dtype, why_dtype = _dtype(config, arch, plan.room)
        return load_runner(
            arch,
            tensors,
            config,
            max_model_len,
            sampler,
            ops=TorchOps(dtype),
            dtype=dtype,
            plan=plan,
            numerics=("cpu", ATTENTION_VERSION, f"torch-{torch.__version__}", dtype, isa(), "tp1"),
            report=(why_threads, why_dtype),
        )


def _dtype(config: EngineConfig, arch: ArchConfig, room: Room) -> tuple[str, str]:
    single = weight_bytes(find_model(arch.name).parameters(arch), 4)
    if 2 * single > room.num_bytes:
        return resolve_dtype(config.model.dtype, "bfloat16", "float32 weights would fill half of free memory")
    return resolve_dtype(config.model.dtype, "float32", "the CPU's most accurate class, and the weights fit")


PLATFORM: Platform = CpuPlatform()
