"""A store on a fake clock whose faults a test chooses, and what its members look like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from xllm.service.registry.embedded import EmbeddedRegistry
from xllm.service.registry.record import MemberRecord
from xllm.testing.clock import FakeClock
from xllm.testing.faulty_registry import FaultyRegistry


@dataclass
class Town:
    """`inner` is the truth; `registry` is what those under test see of it."""

    clock: FakeClock
    inner: EmbeddedRegistry
    registry: FaultyRegistry

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.inner.tick()


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    clock = FakeClock()
    inner = EmbeddedRegistry(clock)
    yield Town(clock=clock, inner=inner, registry=FaultyRegistry(inner))
    await inner.close()
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, left


def record(member_id: str = "one", incarnation: str = "i1", **fields: object) -> MemberRecord:
    known = {"address": "127.0.0.1:4000", "phases": ("prefill", "decode"), "model_ids": ("m",)}
    return MemberRecord(member_id=member_id, incarnation=incarnation, **{**known, **fields})  # type: ignore[arg-type]


async def until(done: Callable[[], bool]) -> None:
    """Wait for a condition that other tasks bring about."""
    async with asyncio.timeout(20.0):
        while not done():
            await asyncio.sleep(0.001)
