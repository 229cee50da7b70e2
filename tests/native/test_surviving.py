"""KV pages of the native kernels taken over from an engine that is gone: the logits have the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from xllm.clock import SystemClock
from xllm.config import CacheConfig, EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.kernels.native.library import find
from xllm.engine.surviving import SharedPages
from xllm.service.instances.pages import SlotPages
from xllm.testing.null_engine import spec

PATH, WHY = find()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no native kernels: {WHY}")

PROMPT = tuple(int(t) for t in np.random.default_rng(3).integers(10, 49_000, 150))
NUM_FULL = 128
"""Tokens of the prompt that lie in full pages."""


@pytest.fixture
def slot() -> Iterator[SlotPages]:
    pages = SlotPages("test")
    yield pages
    pages.close()


def life(smollm2: str, kv: str, slot: SlotPages | None) -> BuiltEngine:
    """The next engine of the slot. The one before it is never told, as if it had been killed. One without a
    slot looks its pages up."""
    cache = CacheConfig(
        num_pages=24,
        kv_cache_dtype="int8" if kv == "int8" else "auto",
        kv_memory="xtensor" if kv == "xtensor" and slot is not None else "paged",
    )
    config = EngineConfig(
        model=ModelConfig(model=smollm2, max_model_len=512),
        cache=cache,
        platform=PlatformConfig(platform="native", num_threads=2),
    )
    shared = None if slot is None or slot.fd is None else SharedPages(slot.fd)
    return build_engine(config, SystemClock(), lambda stage, elapsed_s: None, shared=shared)


def answer(built: BuiltEngine) -> tuple[dict[int, str], int]:
    """({position: digest of its logits}, prompt tokens that came from the cache)."""
    rows: dict[int, str] = {}

    def tap(seq_id: int, position: int, logits: np.ndarray) -> None:
        rows[position] = hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()

    built.runner.logits_tap = tap  # type: ignore[attr-defined]
    core, cached = built.core, 0
    core.submit(spec("one", PROMPT, max_tokens=60, ignore_eos=True))
    while core.has_requests:
        for frame in core.step()[1]:
            cached = max(cached, frame.num_cached_tokens)
            core.scheduler.committed("one", frame.choice, frame.offset + len(frame.tokens))
    core.step()
    return rows, cached


def reported(built: BuiltEngine) -> str:
    (line,) = [line for line in built.report if line.startswith("surviving pages")]
    return line


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "xtensor"])
def test_logits_over_pages_of_an_engine_that_is_gone_have_the_same_bits(
    smollm2: str, slot: SlotPages, kv_dtype: str
) -> None:
    rows, _ = answer(life(smollm2, kv_dtype, None))
    first = life(smollm2, kv_dtype, slot)
    assert reported(first).startswith("surviving pages: 0 taken over, 0 refused")
    assert answer(first) == (rows, 0)
    second = life(smollm2, kv_dtype, slot)
    # Two pages of the prompt and one that the answer filled.
    assert reported(second).startswith("surviving pages: 3 taken over, 0 refused")
    assert answer(second) == (rows, NUM_FULL)


def test_a_flipped_bit_in_a_page_is_refused_and_the_logits_are_right(smollm2: str, slot: SlotPages) -> None:
    first = life(smollm2, "auto", slot)
    rows, _ = answer(first)
    assert first.core.keeper is not None
    group = first.core.keeper._shared.groups[0]
    held = np.flatnonzero(group.headers["state"])
    head = min(held, key=lambda page: int(group.headers["stamp"][page]))
    group.pages[head, group.pages.shape[1] // 2] ^= 1
    second = life(smollm2, "auto", slot)
    assert reported(second).startswith("surviving pages: 2 taken over, 1 refused")
    assert answer(second) == (rows, 0)


def test_pages_of_another_kv_class_are_never_taken(smollm2: str, slot: SlotPages) -> None:
    answer(life(smollm2, "auto", slot))
    other = life(smollm2, "int8", slot)
    assert reported(other).startswith("surviving pages: 0 taken over, 0 refused")
    assert answer(other) == (answer(life(smollm2, "int8", None))[0], 0)
