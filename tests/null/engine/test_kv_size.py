"""KV sizing: asked values win, automatic ones have bounds and a reason, impossible ones are refused."""

from __future__ import annotations

import pytest

from xllm.config.schema import CacheConfig, EngineConfig, SchedulerConfig
from xllm.engine.runner.kv_size import choose_num_pages
from xllm.errors import ConfigError
from xllm.types import KVGroup, KVLayout

MIB = 1 << 20
# One page: 2 · 4 layers · 64 tokens · 2 heads · 128 · 4 bytes = 512 KiB in each of two groups.
GROUPS = tuple(
    KVGroup(kind=kind, layers=(0, 1, 2, 3), num_kv_heads=2, head_dim=128, window=window)
    for kind, window in (("full", None), ("window", 512))
)
LAYOUT = KVLayout(groups=GROUPS, dtype="float32")


def choose(free_bytes: int, max_model_len: int = 1024, max_num_seqs: int = 64, **cache: int | None):
    config = EngineConfig(cache=CacheConfig(**cache), scheduler=SchedulerConfig(max_num_seqs=max_num_seqs))
    return choose_num_pages(LAYOUT, config, max_model_len, free_bytes)


def test_asked_values_win_in_order() -> None:
    pages, why = choose(8000 * MIB, num_pages=40, kv_cache_memory_bytes=100 * MIB)
    assert pages == (40, 40)
    assert "num_pages=40 as asked" in why
    pages, why = choose(8000 * MIB, kv_cache_memory_bytes=100 * MIB)
    assert pages == (100, 100)
    assert "kv_cache_memory_bytes" in why


@pytest.mark.parametrize(
    ("free_mib", "max_model_len", "max_num_seqs", "expected"),
    [
        (8000, 1024, 64, 1024),  # all that can be used: 64 sequences of 16 pages
        (1000, 1024, 64, 250),  # a quarter of free memory
        (100_000, 65536, 64, 4096),  # at most 4 GiB
        (1000, 32000, 4, 500),  # one long sequence needs more than the share
    ],
)
def test_automatic_size(free_mib: int, max_model_len: int, max_num_seqs: int, expected: int) -> None:
    pages, why = choose(free_mib * MIB, max_model_len, max_num_seqs)
    assert pages == (expected, expected)
    assert f"{expected} pages" in why


@pytest.mark.parametrize("cache", [{"num_pages": 15}, {"kv_cache_memory_bytes": 15 * MIB}, {}])
def test_too_little_for_one_sequence_names_the_remedy(cache: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="lower max_model_len to at most"):
        choose(16 * MIB, 1024, **cache)


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 100 MiB are free"):
        choose(100 * MIB, num_pages=101)
