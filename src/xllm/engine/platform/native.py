"""The CPU platform over xLLM's own kernels: no torch, bitwise exact by construction."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec

from xllm.arch import ArchConfig
from xllm.config.env import cache_dir
from xllm.config.schema import EngineConfig
from xllm.engine.fitting import Demand, MemoryPlan, Room, fit
from xllm.engine.kernels.native.handles import private_pages
from xllm.engine.kernels.native.library import find, open_library
from xllm.engine.kernels.native.ops import HEAD_MULTIPLE, KV_ORDER, KVDtype, NativeOps
from xllm.engine.kernels.native.packing import WeightClass
from xllm.engine.kernels.native.programs import BUCKETS
from xllm.engine.kernels.native.spaces import SpaceMapper
from xllm.engine.kernels.native.weights_cache import WeightsCache
from xllm.engine.kvtransfer.memory import anonymous_pages
from xllm.engine.model.layout import kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import weight_bytes
from xllm.engine.platform.base import BuiltRunner, Platform, TensorSource
from xllm.engine.platform.demand import demand_of, process_parts, step_parts
from xllm.engine.platform.host import choose_num_threads
from xllm.engine.platform.loading import load_runner, resolve_dtype
from xllm.engine.platform.native_memory import weight_parts
from xllm.engine.platform.room import measure_room
from xllm.engine.runner.kv_size import page_bytes_of
from xllm.engine.sampling import Sampler
from xllm.engine.surviving import SharedPages
from xllm.errors import ConfigError
from xllm.types import PAGE_SIZE
from xllm.version import __version__

KERNELS_VERSION = "native-2"
"""Raised whenever a change of the kernels may change a bit of the logits."""

PACKING_VERSION = 1
"""Raised when Python hands the packers anything else than before (order, codes, padding); changes of the
packers themselves show in the library's name."""

_DTYPE = "bfloat16"
_EASY_SHARE = 4
"""Weights that take less than one such share of free memory are no burden."""

_CLASSES: dict[str, tuple[WeightClass, WeightClass]] = {
    "none": ("bf16", "bf16"),
    "file": ("bf16", "bf16"),
    "w8g32": ("w8g32", "w8g32"),
    # Four bits cost the head most of what they cost in all; it is read once, the layers thirty times.
    "w4g32": ("w4g32", "w8g32"),
    # Never unasked: one scale per row of activations costs 2–3 % perplexity.
    "w8a8": ("w8a8", "w8g32"),
}
"""Classes of linears and of embedding with head, for what is not kept as the file's codes."""


_WHY_NOT_CODES = (
    "quantize=file: F32, F16, BF16 have no codes, and Q2_K, Q3_K would take 10 to 12 bits a weight as 8-bit "
    "codes; these are bfloat16"
)


class NativePlatform:
    name = "native"

    def __init__(self, shared: SharedPages | None = None) -> None:
        self._shared = shared

    def over(self, shared: SharedPages) -> NativePlatform:
        """The same platform, with its KV pages in memory that outlives the process."""
        return type(self)(shared)

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

    def plan_memory(
        self, arch: ArchConfig, tensors: TensorSource, config: EngineConfig, max_model_len: int
    ) -> MemoryPlan:
        return self._planned(arch, tensors, config, max_model_len, self._room(config))

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
        room = self._room(config)
        plan = self._planned(arch, tensors, config, max_model_len, room)
        threads, why_threads = choose_num_threads(config.platform)
        dtype, why_dtype = resolve_dtype(config.model.dtype, _DTYPE, "what the native kernels compute in")
        quantize, why_quantize = _quantize(config, arch, room)
        kv_dtype = _kv_dtype(config)
        shared, spaces, why_memory = self._kv_memory(config, arch, max_model_len)
        ops = NativeOps(
            open_library(path),
            threads,
            *_CLASSES[quantize],
            quantize == "file",
            kv_dtype,
            private_pages if shared is None else shared.next_group,
            spaces,
        )
        place, why_not_kept = _cache_place(config, arch, tensors, path, quantize)
        kept = None if place is None else _cache(place, tensors, ops)
        built = load_runner(
            arch,
            tensors,
            config,
            max_model_len,
            sampler.drawing_with(ops.row_drawer()),
            ops=ops,
            dtype=dtype,
            plan=plan,
            numerics=("native", KERNELS_VERSION, isa, f"quantize-{quantize}", f"kv-{kv_dtype}", "tp1"),
            kv_order=KV_ORDER,
            kv_dtype=kv_dtype,
            make_programs=ops.programs,
            make_jobs=ops.queue,
            kept=kept,
            report=(
                why_threads,
                why_dtype,
                why_quantize,
                f"kv_cache_dtype={kv_dtype}: {'as asked' if kv_dtype == 'int8' else 'as dtype'}",
                why_memory,
                f"kernels={isa}: the best path this CPU can run",
            ),
        )
        sizes = ", ".join(f"{size >> 20} MiB {name}" for name, size in sorted(ops.packed_bytes.items()))
        packed = f"packed weights: {sizes} (quantize={quantize})"
        kept_lines = (why_not_kept,) if kept is None else tuple(kept.report)
        no_codes = (_WHY_NOT_CODES,) if quantize == "file" and "bf16" in ops.packed_bytes else ()
        return replace(built, mapper=spaces, report=(*built.report, packed, *no_codes, *kept_lines))

    def _kv_memory(
        self, config: EngineConfig, arch: ArchConfig, max_model_len: int
    ) -> tuple[SharedPages | None, SpaceMapper | None, str]:
        """(file of the pages, mapper of spaces over it, report line)."""
        asked, shared = config.cache.kv_memory, self._shared
        if asked != "xtensor":
            why = "as asked" if asked == "paged" else "unless another is shown to be faster (ADR 0021)"
            return shared, None, f"kv_memory=paged: {why}"
        shared = anonymous_pages() if shared is None else shared
        if shared is None:
            raise ConfigError(
                "kv_memory=xtensor: this system has no anonymous files; use kv_memory=paged",
                param="kv_memory",
            )
        space_pages = -(-max_model_len // PAGE_SIZE)
        num_groups = len(kv_layout(arch, _DTYPE).groups)
        num_seqs = config.scheduler.max_num_seqs
        spaces = SpaceMapper(shared, num_groups, space_pages, num_seqs)
        most, limit = num_seqs * space_pages * num_groups, spaces.max_mappings
        why = f"kv_memory=xtensor: as asked; {num_seqs} sequences need {most} mappings, {limit} are allowed"
        if most > limit:
            why += ": beyond, sequences are read through page tables; lower max_model_len or max_num_seqs"
        return shared, spaces, why

    def _room(self, config: EngineConfig) -> Room:
        """What an earlier engine has filled of pages that outlive it is ours to fill again."""
        room = measure_room(asked=config.platform.memory_bytes)
        kept = 0 if self._shared is None or config.platform.memory_bytes else self._shared.resident_bytes
        return room._replace(num_bytes=room.num_bytes + kept)

    def _planned(
        self, arch: ArchConfig, tensors: TensorSource, config: EngineConfig, max_model_len: int, room: Room
    ) -> MemoryPlan:
        layout = kv_layout(arch, _kv_dtype(config), KV_ORDER)
        before = None
        if self._shared is not None:
            page_bytes = tuple(page_bytes_of(group, layout.dtype) for group in layout.groups)
            before = self._shared.num_pages(layout.digest(), page_bytes)

        def demand(changed: EngineConfig, length: int) -> Demand:
            return _demand(arch, tensors, changed, length, room)

        return fit(config, max_model_len, room, demand, before)


def _demand(
    arch: ArchConfig, tensors: TensorSource, config: EngineConfig, max_model_len: int, room: Room
) -> Demand:
    path, _ = find()
    quantize, _ = _quantize(config, arch, room)
    place = None if path is None else _cache_place(config, arch, tensors, path, quantize)[0]
    threads, _ = choose_num_threads(config.platform)
    shared, own, loading = weight_parts(
        find_model(arch.name).parameters(arch),
        _CLASSES[quantize],
        tensors.code_kind if quantize == "file" else None,
        kept=place is not None,
        found=place is not None and place.exists(),
    )
    return demand_of(
        arch,
        config,
        max_model_len,
        kv_layout(arch, _kv_dtype(config), KV_ORDER),
        shared=shared,
        own=(*process_parts(arch, config), *own),
        working=step_parts(arch, config, max_model_len, BUCKETS, threads),
        loading=loading,
        # Whoever packs holds the lock of the directory.
        loads_in_turn=place is not None,
    )


def _cache_place(
    config: EngineConfig, arch: ArchConfig, tensors: TensorSource, library: Path, quantize: str
) -> tuple[Path | None, str]:
    """(the file of packed weights, whether it is there or not, "") or (None, report line)."""
    asked = config.model.weights_cache
    if asked == "off":
        return None, "weights_cache=off: as asked"
    identity = tensors.identity()
    if not identity:
        return None, "weights_cache=off: nothing vouches for these weights being the same next time"
    directory = cache_dir() / "packed" if asked == "auto" else Path(asked).expanduser()
    facts = (PACKING_VERSION, __version__, library.name, quantize, _CLASSES[quantize], identity, arch)
    key = hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()[:32]
    return WeightsCache.path(directory, key), ""


def _cache(path: Path, tensors: TensorSource, ops: NativeOps) -> WeightsCache:
    identity = tensors.identity()
    return WeightsCache(path.parent, path.stem, ops.packer, lambda: tensors.identity() == identity)


def _kv_dtype(config: EngineConfig) -> KVDtype:
    return "int8" if config.cache.kv_cache_dtype == "int8" else "bfloat16"


def _quantize(config: EngineConfig, arch: ArchConfig, room: Room) -> tuple[str, str]:
    """(weight class, report line). Unasked, accuracy wins while bfloat16 weights are no burden."""
    asked = config.model.quantize
    if asked != "auto":
        return asked, f"quantize={asked}: as asked"
    needed, free = weight_bytes(find_model(arch.name).parameters(arch), 2), room.num_bytes
    if needed * _EASY_SHARE <= free:
        return "none", f"quantize=none: bfloat16 weights take {needed >> 20} MiB, which is little here"
    return "file", f"quantize=file: bfloat16 weights would take {needed >> 20} of {free >> 20} MiB"


PLATFORM: Platform = NativePlatform()
