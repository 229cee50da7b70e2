"""The CPU platform over xLLM's own kernels: no torch, bitwise exact by construction."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec

from xllm.arch import ArchConfig
from xllm.config.env import cache_dir
from xllm.config.schema import EngineConfig
from xllm.engine.kernels.native.handles import private_pages
from xllm.engine.kernels.native.library import find, open_library
from xllm.engine.kernels.native.ops import HEAD_MULTIPLE, KV_ORDER, KVDtype, NativeOps
from xllm.engine.kernels.native.packing import WeightClass
from xllm.engine.kernels.native.spaces import SpaceMapper
from xllm.engine.kernels.native.weights_cache import WeightsCache
from xllm.engine.kvtransfer.memory import anonymous_pages
from xllm.engine.model.layout import kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import weight_bytes
from xllm.engine.platform.base import BuiltRunner, Platform, TensorSource
from xllm.engine.platform.host import available_bytes, choose_num_threads
from xllm.engine.platform.loading import load_runner, resolve_dtype
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
        threads, why_threads = choose_num_threads(config.platform)
        dtype, why_dtype = resolve_dtype(config.model.dtype, _DTYPE, "what the native kernels compute in")
        quantize, why_quantize = _quantize(config, arch)
        kv_dtype: KVDtype = "int8" if config.cache.kv_cache_dtype == "int8" else "bfloat16"
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
        kept, why_not_kept = _cache(config, arch, tensors, ops, path, quantize)
        built = load_runner(
            arch,
            tensors,
            config,
            max_model_len,
            sampler.drawing_with(ops.row_drawer()),
            ops=ops,
            dtype=dtype,
            free_bytes=lambda: max(0, available_bytes() - (0 if kept is None else kept.mapped_bytes)),
            numerics=("native", KERNELS_VERSION, isa, f"quantize-{quantize}", f"kv-{kv_dtype}", "tp1"),
            kv_order=KV_ORDER,
            kv_dtype=kv_dtype,
            make_programs=ops.programs,
            make_jobs=ops.queue,
            kept=kept,
            shared=shared,
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
            why = "as asked" if asked == "paged" else "kernels take no longer over a page table (ADR 0021)"
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


def _cache(
    config: EngineConfig,
    arch: ArchConfig,
    tensors: TensorSource,
    ops: NativeOps,
    library: Path,
    quantize: str,
) -> tuple[WeightsCache | None, str]:
    """(the cache, "") or (None, report line)."""
    asked = config.model.weights_cache
    if asked == "off":
        return None, "weights_cache=off: as asked"
    identity = tensors.identity()
    if not identity:
        return None, "weights_cache=off: nothing vouches for these weights being the same next time"
    directory = cache_dir() / "packed" if asked == "auto" else Path(asked).expanduser()
    facts = (PACKING_VERSION, __version__, library.name, quantize, _CLASSES[quantize], identity, arch)
    key = hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()[:32]
    return WeightsCache(directory, key, ops.packer, lambda: tensors.identity() == identity), ""


def _quantize(config: EngineConfig, arch: ArchConfig) -> tuple[str, str]:
    """(weight class, report line). Unasked, accuracy wins while bfloat16 weights are no burden."""
    asked = config.model.quantize
    if asked != "auto":
        return asked, f"quantize={asked}: as asked"
    needed, free = weight_bytes(find_model(arch.name).parameters(arch), 2), available_bytes()
    if needed * _EASY_SHARE <= free:
        return "none", f"quantize=none: bfloat16 weights take {needed >> 20} MiB, which is little here"
    return "file", f"quantize=file: bfloat16 weights would take {needed >> 20} of {free >> 20} MiB"


PLATFORM: Platform = NativePlatform()
