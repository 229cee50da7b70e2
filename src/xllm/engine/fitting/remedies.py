"""Settings that would make a refused plan fit. Each is tried: with what is named here the engine starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Literal

from xllm.config.schema import EngineConfig
from xllm.engine.fitting.plan import MemoryPlan
from xllm.types import PAGE_SIZE

Plan = Callable[[EngineConfig, int], MemoryPlan]
"""(settings, max_model_len) → what would be planned."""

_MAX_SHOWN = 4
_LEAST_LEN = 4 * PAGE_SIZE
"""A shorter context is no use to anybody."""
_LEAST_ROWS = 64
_QUANTIZE: tuple[Literal["file", "w8g32", "w4g32"], ...] = ("file", "w8g32", "w4g32")
"""In the order of what they cost in accuracy."""


def remedies(config: EngineConfig, max_model_len: int, plan: Plan) -> list[str]:
    """Flags with values, those that cost users least first; several at once where no single one is enough;
    empty = nothing helps."""
    tried = (_pages, _engines, _length, _kv_dtype, _weights, _rows)
    found = list(islice((r for attempt in tried for r in attempt(config, max_model_len, plan)), _MAX_SHOWN))
    return found or list(islice(_together(config, max_model_len, plan), 1))


def _pages(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    """What would be taken unasked, where something else was asked for."""
    cache = config.cache
    if cache.num_pages is not None or cache.kv_cache_memory_bytes is not None:
        unasked = replace(cache, num_pages=None, kv_cache_memory_bytes=None)
        found = plan(replace(config, cache=unasked), max_model_len)
        if found.fits:
            yield f"--num-pages {found.num_pages}"


def _engines(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    def good(count: int) -> bool:
        platform = replace(config.platform, num_local_instances=count)
        return plan(replace(config, platform=platform), max_model_len).fits

    if fewer := _largest(1, config.platform.num_local_instances - 1, 1, good):
        yield f"--instances mixed:{fewer}"


def _length(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    def good(length: int) -> bool:
        return plan(config, length).fits

    if length := _largest(_LEAST_LEN, max_model_len - 1, PAGE_SIZE, good):
        yield f"--max-model-len {length}"


def _kv_dtype(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    changed = replace(config, cache=replace(config.cache, kv_cache_dtype="int8"))
    if config.cache.kv_cache_dtype != "int8" and plan(changed, max_model_len).fits:
        yield "--kv-cache-dtype int8"


def _weights(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    if config.model.quantize not in ("auto", "none"):
        return
    for name in _QUANTIZE:
        changed = replace(config, model=replace(config.model, quantize=name))
        if plan(changed, max_model_len).fits:
            yield f"--quantize {name}"
            return


def _rows(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    def good(rows: int) -> bool:
        scheduler = replace(config.scheduler, max_num_batched_tokens=rows)
        return plan(replace(config, scheduler=scheduler), max_model_len).fits

    if rows := _largest(_LEAST_ROWS, config.scheduler.max_num_batched_tokens - 1, _LEAST_ROWS, good):
        yield f"--max-num-batched-tokens {rows}"


def _together(config: EngineConfig, max_model_len: int, plan: Plan) -> Iterator[str]:
    """Smaller weights, and then the longest context that they leave room for."""
    for name in (config.model.quantize, *_QUANTIZE):
        for dtype in dict.fromkeys((config.cache.kv_cache_dtype, "int8")):
            model = replace(config.model, quantize=name)
            changed = replace(config, model=model, cache=replace(config.cache, kv_cache_dtype=dtype))
            weights = "" if name == config.model.quantize else f"--quantize {name} "
            pages = "" if dtype == config.cache.kv_cache_dtype else f"--kv-cache-dtype {dtype} "
            for length in _length(changed, max_model_len, plan):
                yield f"{weights}{pages}{length}"


def _largest(least: int, most: int, step: int, good: Callable[[int], bool]) -> int:
    """The largest multiple of `step` in [least, most] that is good, where less is never worse; 0 = none."""
    low, high = -(-least // step), most // step
    if low > high or not good(low * step):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle * step) else (low, middle - 1)
    return low * step
