"""Makes native runners without a scheduler; `tests.reference.runner_driver` drives them."""

from __future__ import annotations

import functools

from xllm.arch import ArchConfig
from xllm.engine.kernels.native.library import find, open_library
from xllm.engine.kernels.native.ops import KVDtype, NativeOps
from xllm.engine.kernels.native.packing import WeightClass
from xllm.engine.kernels.native.sampling import NativeDrawer
from xllm.engine.model.layout import kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import Tensors, load_weights
from xllm.engine.runner.queued import QueuedRunner
from xllm.engine.sampling import Sampler


@functools.cache
def library(isa: str | None = None):
    """The library of a path, by default of the best one; None if it is not built or the CPU cannot run it."""
    path, _ = find(None if isa is None else frozenset({isa}))
    return None if path is None else open_library(path)


@functools.cache
def drawer(isa: str | None = None, num_threads: int = 1) -> NativeDrawer | None:
    """A drawer with a pool of its own, kept for the process; None where there is no library."""
    found = library(isa)
    return None if found is None else NativeDrawer(found, found.xn_pool_create(num_threads))


def make_native_runner(
    arch: ArchConfig,
    tensors: Tensors,
    weight_class: WeightClass = "bf16",
    num_pages: int = 64,
    num_positions: int = 1024,
    num_threads: int = 2,
    keeps_codes: bool = False,
    isa: str | None = None,
    programs: bool = True,
    kv_dtype: KVDtype = "bfloat16",
    head_class: WeightClass | None = None,
) -> QueuedRunner:
    classes = weight_class, head_class or weight_class
    ops = NativeOps(library(isa), num_threads, *classes, keeps_codes, kv_dtype)
    model = find_model(arch.name)
    weights = load_weights(model, arch, tensors, ops, num_positions)
    ops.probe([weights.layers[0][k] for k in ("qkv", "o", "gate_up", "down")] + [weights.top["head"]])
    layout = kv_layout(arch, kv_dtype)
    sampler = Sampler(drawer=ops.row_drawer())
    runner = QueuedRunner(model, arch, weights, ops, layout, [num_pages] * len(layout.groups), sampler)
    if programs:
        runner.record(ops.programs)
        assert runner.programs is not None
        runner.use_queue(ops.queue(runner.programs))
    return runner
