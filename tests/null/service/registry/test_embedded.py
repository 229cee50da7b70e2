"""The embedded registry passes the conformance suite; a fake clock is its time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.null.service.registry.conformance import *  # noqa: F403
from tests.null.service.registry.conformance import Store
from xllm.service.registry.base import WatchLost
from xllm.service.registry.embedded import MAX_HISTORY, EmbeddedRegistry
from xllm.testing.clock import FakeClock


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    clock = FakeClock()
    registry = EmbeddedRegistry(clock)

    async def compact(revision: int) -> None:
        registry.compact(revision)

    async def pass_time(seconds: float) -> None:
        clock.advance(seconds)
        registry.tick()

    yield Store(registry=registry, other=registry, compact=compact, pass_time=pass_time, min_ttl_s=1.0)
    await registry.close()


async def test_the_history_is_bounded_and_a_watch_that_needs_more_is_lost(store: Store) -> None:
    first = await store.registry.put("/c/a", b"")
    for _ in range(MAX_HISTORY + 1):
        await store.registry.put("/c/a", b"")
    with pytest.raises(WatchLost):
        await anext(store.registry.watch("/c/", first))
