"""How many KV pages an engine gets, and why. Arithmetic over facts; nothing is allocated here."""

from __future__ import annotations

from xllm.config.schema import EngineConfig
from xllm.errors import ConfigError
from xllm.types import KVGroup, KVLayout

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = {"int8": 4}
"""Beside the elements of a position and head, where a KV dtype has scales."""

_SHARE = 0.25
_MAX_AUTO_BYTES = 4 << 30
_MAX_SHARE = 0.8
"""Beyond this part of free memory not even one sequence of full length is worth it."""

_MIB = 1 << 20


def page_bytes_of(group: KVGroup, dtype: str) -> int:
    return group.page_bytes(DTYPE_BYTES[dtype], SCALE_BYTES.get(dtype, 0))


def choose_num_pages(
    layout: KVLayout, config: EngineConfig, max_model_len: int, free_bytes: int, before: int | None = None
) -> tuple[tuple[int, ...], str]:
    """Pages per KV group (the same for each) and the reason for start-up.

    `free_bytes` is counted after the weights are loaded; `before` is what an earlier engine chose whose
    pages are still there. Raises ConfigError when one sequence of
    `max_model_len` tokens would not fit, since such a request could never run.
    """
    page_bytes = sum(page_bytes_of(g, layout.dtype) for g in layout.groups)
    needed = -(-max_model_len // layout.page_size)
    useful = needed * config.scheduler.max_num_seqs
    num_pages, why = _number(config, page_bytes, needed, useful, free_bytes, before)
    if num_pages < needed:
        raise ConfigError(
            f"KV cache: {num_pages} pages ({why}) hold {num_pages * layout.page_size} tokens, but one "
            f"sequence of max_model_len={max_model_len} needs {needed} pages; lower max_model_len to at most "
            f"{num_pages * layout.page_size} or give the KV cache {needed * page_bytes // _MIB + 1} MiB",
            param="kv_cache_memory_bytes",
        )
    if num_pages * page_bytes > free_bytes:
        raise ConfigError(
            f"KV cache: {num_pages} pages take {num_pages * page_bytes // _MIB} MiB, but only "
            f"{free_bytes // _MIB} MiB are free; lower num_pages or kv_cache_memory_bytes",
            param="num_pages",
        )
    size = f"{num_pages} pages of {layout.page_size} tokens, {num_pages * page_bytes // _MIB} MiB"
    return (num_pages,) * len(layout.groups), f"kv_cache={size}: {why}"


def _number(
    config: EngineConfig, page_bytes: int, needed: int, useful: int, free_bytes: int, before: int | None
) -> tuple[int, str]:
    cache = config.cache
    if cache.num_pages is not None:
        return cache.num_pages, f"num_pages={cache.num_pages} as asked"
    if cache.kv_cache_memory_bytes is not None:
        asked = cache.kv_cache_memory_bytes
        return asked // page_bytes, f"kv_cache_memory_bytes={asked} as asked"
    if before is not None:
        return before, "as the engine before this one had, whose pages may be reused"
    sharers = max(1, config.platform.num_local_instances)
    share = min(int(free_bytes * _SHARE), _MAX_AUTO_BYTES) // (page_bytes * sharers)
    part = f"{_SHARE:.0%} of {free_bytes // _MIB} MiB free" + (
        "" if sharers == 1 else f", for {sharers} engines"
    )
    if useful <= share:
        return useful, "all that max_num_seqs × max_model_len can use"
    if share >= needed:
        return share, f"{part}, at most {_MAX_AUTO_BYTES // sharers // _MIB} MiB"
    if needed * page_bytes <= free_bytes * _MAX_SHARE:
        return needed, "enough for one sequence of max_model_len"
    return share, part
