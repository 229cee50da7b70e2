"""Cache-aware placement through everything: front, page deltas, index, real schedulers on the null device."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from tests.null.engine.test_learnt_cost import TimedExecutor
from tests.null.service.conftest import ASSETS, byte_ids, collect
from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig, SchedulerConfig
from xllm.engine.core import EngineCore
from xllm.engine.executor.inproc import InProcExecutor
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.instances.handshake import start_engine
from xllm.testing.engine_thread import ThreadedEngineStream
from xllm.testing.null_engine import NullEngine, null_engine
from xllm.types import PAGE_SIZE, SamplingParams
from xllm.wire.messages import KvDelta


@dataclass
class Fleet:
    front: Front
    engines: dict[str, NullEngine] = field(default_factory=dict)
    streams: dict[str, ThreadedEngineStream] = field(default_factory=dict)

    async def join(self, name: str) -> None:
        engine = null_engine(num_pages=200, config=SchedulerConfig(max_num_batched_tokens=128))
        # Steps that take the time of a small model: where computing is free, a cached page is worth nothing.
        timed = TimedExecutor(InProcExecutor(engine.runner))
        core = EngineCore(engine.core.card, engine.core.scheduler, engine.memory, timed, engine.clock)
        engine = replace(engine, core=core)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in ASSETS.items()}
        engine.core.card = msgspec.structs.replace(engine.core.card, assets=digests)
        stream = ThreadedEngineStream(engine.core, {digests[n]: data for n, data in ASSETS.items()})
        ready = await start_engine(stream, EngineConfig(), timeout_s=30.0)
        await self.front.add_instance(stream, ready.card, name=name)
        self.engines[name], self.streams[name] = engine, stream

    async def turn(self, text: str) -> tuple[int, list[int]]:
        """(cached prompt tokens, output) of one request."""
        params = SamplingParams(max_tokens=8, ignore_eos=True, seed=3)
        live = await self.front.submit(
            RequestDraft(model="null", prompt_token_ids=byte_ids(text), params=params)
        )
        deltas = await collect(live)
        return live.usage().cached_tokens, [t for d in deltas for t in d.token_ids]

    def knows_all(self) -> bool:
        index = self.front.kv_index
        return all(index.digests(n) == set(e.memory.names()) for n, e in self.engines.items())

    def holders(self) -> set[str]:
        return {name for name in self.engines if self.front.kv_index.num_pages(name)}


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet(Front(FrontConfig(router_policy="cache-aware"), None, SystemClock()))
    for name in ("a", "b", "c"):
        await made.join(name)
    yield made
    made.front.kv_index.check()
    await made.front.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)


async def test_every_turn_of_a_chat_finds_the_pages_of_the_turn_before(fleet: Fleet) -> None:
    texts = {c: f"chat {c}: " + "hello " * 30 for c in range(6)}
    before = dict.fromkeys(texts, 0)
    for _ in range(4):
        for c, text in texts.items():
            await until(fleet.knows_all)
            cached, _ = await fleet.turn(text)
            assert cached >= before[c] // PAGE_SIZE * PAGE_SIZE
            before[c] = len(text)
            texts[c] = text + "next " * 30
    assert fleet.holders() == {"a", "b", "c"}


async def test_the_index_heals_when_a_delta_was_missed(fleet: Fleet) -> None:
    await fleet.turn("one " * 60)
    await until(lambda: fleet.knows_all() and bool(fleet.holders()))
    (home,) = fleet.holders()
    assert not fleet.front.kv_index.apply(home, KvDelta(seq=12_345, removed=(b"x" * 16,)))
    await fleet.turn("one " * 60 + "two " * 60)
    await until(fleet.knows_all)
    pages = fleet.front.kv_index.num_pages(home)
    cached, _ = await fleet.turn("one " * 60 + "two " * 60)
    assert pages >= 7
    assert cached >= 6 * PAGE_SIZE


async def test_after_a_death_the_next_turn_goes_elsewhere_and_says_the_same(fleet: Fleet) -> None:
    text = "once upon a time " * 20
    _, before = await fleet.turn(text)
    await until(lambda: fleet.knows_all() and bool(fleet.holders()))
    (home,) = fleet.holders()
    await fleet.streams.pop(home).close()
    fleet.engines.pop(home)
    await until(lambda: home not in fleet.front.kv_index.instances())
    cached, after = await fleet.turn(text)
    assert (cached, after) == (0, before)
    await until(lambda: bool(fleet.holders()) and fleet.knows_all())
    assert (await fleet.turn(text))[0] >= 4 * PAGE_SIZE
