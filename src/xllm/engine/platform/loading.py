"""What every platform with an eager backend does to load a model: weights, probe, pages, runner."""

from __future__ import annotations

from collections.abc import Callable

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.kernels.ops import Backend
from xllm.engine.model.layout import ORDER, kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import Kept, load_weights, weight_bytes
from xllm.engine.platform.base import BuiltRunner, TensorSource
from xllm.engine.platform.host import trim_heap
from xllm.engine.runner.kv_size import DTYPE_BYTES, choose_num_pages
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler
from xllm.errors import ConfigError

_MIB = 1 << 20


def load_runner(
    arch: ArchConfig,
    tensors: TensorSource,
    config: EngineConfig,
    max_model_len: int,
    sampler: Sampler,
    *,
    ops: Backend,
    dtype: str,
    free_bytes: Callable[[], int],
    numerics: tuple[str, ...],
    report: tuple[str, ...],
    kv_order: str = ORDER,
    kept: Kept | None = None,
) -> BuiltRunner:
    """`free_bytes` is asked before and after loading. `numerics` and `report` are the platform's own,
    `kv_order` is how its backend keeps a page, `kept` where it keeps packed weights between starts."""
    model = find_model(arch.name)
    needed, free = weight_bytes(model.parameters(arch), DTYPE_BYTES[dtype]), free_bytes()
    if needed > free:
        raise ConfigError(
            f"model: the weights take {needed // _MIB} MiB as {dtype}, {free // _MIB} MiB are free; "
            "choose a smaller model or dtype",
            param="dtype",
        )
    weights = load_weights(model, arch, tensors, ops, max_model_len, kept)
    tensors.release()
    # One layer has every shape of the others; vectors are not multiplied.
    shapes = [weights.layers[0][key] for key in ("qkv", "o", "gate_up", "down") if key in weights.layers[0]]
    ops.probe([*shapes, weights.top["head"]])
    # Loading and probing leave up to half a gigabyte of freed arrays behind in the C library.
    trim_heap()
    layout = kv_layout(arch, dtype, kv_order)
    num_pages, why_pages = choose_num_pages(layout, config, max_model_len, free_bytes())
    runner = ModelRunner(model, arch, weights, ops, layout, num_pages, sampler, numerics)
    exact = "measured: rows do not depend on their company"
    if not ops.deterministic:
        exact = "no row count was found for which rows are independent of their company"
    return BuiltRunner(
        runner=runner,
        num_pages=num_pages,
        report=(
            *report,
            f"weights={needed // _MIB} MiB as {dtype}",
            f"deterministic={ops.deterministic}: {exact} (row multiple {ops.row_multiple})",
            why_pages,
        ),
    )


def no_quantize(config: EngineConfig) -> tuple[str, ...]:
    """Why a platform that computes on dequantised weights cannot serve `quantize`; empty = it can."""
    asked = config.model.quantize
    return () if asked in ("auto", "none") else (f"quantize={asked} needs the native platform",)


def resolve_dtype(asked: str, automatic: str, why: str) -> tuple[str, str]:
    """(dtype, report line)."""
    if asked == "auto":
        return automatic, f"dtype={automatic}: {why}"
    return asked, f"dtype={asked}: as asked"
