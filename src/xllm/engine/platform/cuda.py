"""The reference ops on the first CUDA device that torch sees. Correct, not tuned; never claims exactness."""

from __future__ import annotations

import torch

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.fitting import Demand, MemoryPlan, Room, fit
from xllm.engine.fitting.plan import MIB
from xllm.engine.kernels.reference.torch_ops import TorchOps
from xllm.engine.platform.base import BuiltRunner, Platform, TensorSource
from xllm.engine.platform.demand import torch_demand
from xllm.engine.platform.loading import load_runner, no_native, resolve_dtype
from xllm.engine.sampling import Sampler

ATTENTION_VERSION = "reference-1"


class CudaPlatform:
    name = "cuda"

    def why_not(self, config: EngineConfig, arch: ArchConfig) -> tuple[str, ...]:
        if torch.version.cuda is None:
            return ("this torch was built without CUDA",)
        if not torch.cuda.is_available():
            return ("torch sees no CUDA device",)
        return no_native(config)

    def plan_memory(
        self, arch: ArchConfig, tensors: TensorSource, config: EngineConfig, max_model_len: int
    ) -> MemoryPlan:
        def demand(changed: EngineConfig, length: int) -> Demand:
            return torch_demand(arch, changed, length, _dtype(changed)[0], 0, ())

        return fit(config, max_model_len, _room(), demand)

    def create_runner(
        self,
        arch: ArchConfig,
        tensors: TensorSource,
        config: EngineConfig,
        max_model_len: int,
        sampler: Sampler,
    ) -> BuiltRunner:
        # Reduced-precision float32 products would make the float32 class a lie.
        torch.backends.cuda.matmul.allow_tf32 = False
        device = torch.cuda.get_device_name(0)
        plan = self.plan_memory(arch, tensors, config, max_model_len)
        dtype, why_dtype = _dtype(config)
        return load_runner(
            arch,
            tensors,
            config,
            max_model_len,
            sampler,
            ops=TorchOps(dtype, "cuda"),
            dtype=dtype,
            plan=plan,
            numerics=("cuda", ATTENTION_VERSION, f"torch-{torch.__version__}", dtype, device, "tp1"),
            report=(f"device={device}", why_dtype),
        )


def _dtype(config: EngineConfig) -> tuple[str, str]:
    return resolve_dtype(config.model.dtype, "bfloat16", "native on current devices")


def _room() -> Room:
    free, whole = torch.cuda.mem_get_info(0)
    return Room(int(free), f"free of the device's {int(whole) // MIB} MiB")


PLATFORM: Platform = CudaPlatform()
