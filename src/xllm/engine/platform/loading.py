"""What every platform with an eager backend does to load a model: weights, probe, pages, runner."""

from __future__ import annotations

import logging

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.fitting import MemoryPlan
from xllm.engine.kernels.ops import Backend
from xllm.engine.kernels.programs import MakeJobs, MakePrograms
from xllm.engine.model.layout import ORDER, kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import Kept, load_weights, weight_bytes
from xllm.engine.platform.base import BuiltRunner, TensorSource
from xllm.engine.platform.host import trim_heap
from xllm.engine.runner.kv_size import DTYPE_BYTES
from xllm.engine.runner.queued import QueuedRunner
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler
from xllm.errors import ConfigError

log = logging.getLogger(__name__)

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
    plan: MemoryPlan,
    numerics: tuple[str, ...],
    report: tuple[str, ...],
    kv_order: str = ORDER,
    kv_dtype: str | None = None,
    make_programs: MakePrograms | None = None,
    make_jobs: MakeJobs | None = None,
    kept: Kept | None = None,
) -> BuiltRunner:
    """`plan` says how many pages fit. `numerics` and `report` are the platform's own, `kv_order` is how its
    backend keeps a page, `kv_dtype` in what if not in `dtype`. `make_programs` is how it records and
    `make_jobs` how it takes the next step while one runs, if it does. `kept` is where it keeps packed weights
    between starts."""
    model = find_model(arch.name)
    needed = weight_bytes(model.parameters(arch), DTYPE_BYTES[dtype])
    weights = load_weights(model, arch, tensors, ops, max_model_len, kept)
    tensors.release()
    # One layer has every shape of the others; vectors are not multiplied.
    shapes = [weights.layers[0][key] for key in ("qkv", "o", "gate_up", "down") if key in weights.layers[0]]
    ops.probe([*shapes, weights.top["head"]])
    # Loading and probing leave up to half a gigabyte of freed arrays behind in the C library.
    trim_heap()
    layout = kv_layout(arch, kv_dtype or dtype, kv_order)
    num_pages = (plan.num_pages,) * len(layout.groups)
    queues = make_jobs is not None and config.platform.programs != "off"
    kind = QueuedRunner if queues else ModelRunner
    runner = kind(model, arch, weights, ops, layout, num_pages, sampler, numerics)
    why_programs = _programs(runner, config, make_programs)
    if make_jobs is not None and isinstance(runner, QueuedRunner) and runner.programs is not None:
        runner.use_queue(make_jobs(runner.programs))
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
            why_programs,
            *(f"memory: {line}" for line in plan.lines()),
        ),
    )


def _programs(runner: ModelRunner, config: EngineConfig, make: MakePrograms | None) -> str:
    """Record the model if asked and able; the report line. Raises ConfigError for `on` that cannot be."""
    asked = config.platform.programs
    if asked == "off":
        return "programs=off: as asked"
    why = "this platform calls op by op"
    if make is not None:
        try:
            counters = runner.record(make)
        except Exception as error:
            # A model file from outside the tree may do with a buffer what only an eager backend allows.
            log.warning("the model could not be recorded", exc_info=True)
            why = f"the model could not be recorded ({error})"
        else:
            return (
                f"programs=on: {counters.operations} operations a step in one call, "
                f"up to {counters.max_rows} rows"
            )
    if asked == "on":
        raise ConfigError(f"programs=on: {why}", param="programs")
    return f"programs=off: {why}"


def no_native(config: EngineConfig) -> tuple[str, ...]:
    """Why a platform that keeps neither weights nor KV as codes, and KV in pages only, cannot serve this;
    empty = it can."""
    reasons = []
    if config.model.quantize not in ("auto", "none"):
        reasons.append(f"quantize={config.model.quantize} needs the native platform")
    if config.cache.kv_cache_dtype != "auto":
        reasons.append(f"kv_cache_dtype={config.cache.kv_cache_dtype} needs the native platform")
    if config.cache.kv_memory == "xtensor":
        reasons.append("kv_memory=xtensor needs the native platform")
    return tuple(reasons)


def resolve_dtype(asked: str, automatic: str, why: str) -> tuple[str, str]:
    """(dtype, report line)."""
    if asked == "auto":
        return automatic, f"dtype={automatic}: {why}"
    return asked, f"dtype={asked}: as asked"
