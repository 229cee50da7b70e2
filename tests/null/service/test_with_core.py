"""The front over the real scheduler and memory, null device: credit, abort and stop on both sides."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest

from tests.null.service.conftest import ASSETS, byte_ids, collect, outcome
from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig, SchedulerConfig
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.instances.handshake import start_engine
from xllm.service.live import LiveRequest
from xllm.testing.engine_thread import ThreadedEngineStream
from xllm.testing.null_engine import NullEngine, null_engine
from xllm.types import SamplingParams


@dataclass
class Bench:
    front: Front
    engine: NullEngine

    async def submit(self, prompt: str, **params: object) -> LiveRequest:
        sampling = SamplingParams(**{"max_tokens": 48, "ignore_eos": True, **params})  # type: ignore[arg-type]
        return await self.front.submit(
            RequestDraft(model="null", prompt_token_ids=byte_ids(prompt), params=sampling)
        )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    engine = null_engine(num_pages=24, config=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in ASSETS.items()}
    engine.core.card = msgspec.structs.replace(engine.core.card, assets=digests)
    stream = ThreadedEngineStream(engine.core, {digests[name]: data for name, data in ASSETS.items()})
    # Far more than the pages can hold, on purpose: preemption is part of what is tried here.
    config = FrontConfig(stream_buffer_tokens=32, max_kv_oversubscription=100.0)
    front = Front(config, None, SystemClock())
    ready = await start_engine(stream, EngineConfig(), timeout_s=30.0)
    await front.add_instance(stream, ready.card, name="core")
    yield Bench(front, engine)
    await front.close()
    assert not engine.core.has_requests
    engine.memory.check_idle()


async def test_a_long_output_needs_and_gets_credit(bench: Bench) -> None:
    stream = await bench.submit("a", max_tokens=300)
    deltas = await collect(stream)
    assert sum(len(d.token_ids) for d in deltas) == stream.usage().completion_tokens == 300


async def test_seeded_output_does_not_depend_on_company(bench: Bench) -> None:
    alone = await collect(await bench.submit("tell me", seed=5))
    streams = [await bench.submit("tell me" if i == 3 else f"other {i}", seed=5) for i in range(6)]
    together = await asyncio.gather(*(collect(s) for s in streams))
    joined = [t for d in together[3] for t in d.token_ids]
    assert joined == [t for d in alone for t in d.token_ids]


async def test_a_stop_string_of_one_choice_never_blocks_the_others(bench: Bench) -> None:
    plain = await collect(await bench.submit("x", n=2, seed=9, max_tokens=120))
    text = "".join(d.text for d in plain if d.choice == 0)
    stop = next(c for c in text if c.isprintable() and c != "\ufffd")
    deltas = await collect(await bench.submit("x", n=2, seed=9, max_tokens=120, stop=stop))
    ended = {d.choice: d.finish_reason for d in deltas if d.finish_reason}
    assert ended[0] == "stop"
    assert set(ended) == {0, 1}


async def test_every_request_ends_whatever_its_reader_does(bench: Bench) -> None:
    rng = random.Random(7)

    async def client(index: int) -> str:
        stream = await bench.submit("p" * rng.randint(1, 150), n=rng.choice([1, 1, 2]), seed=index)
        habit = rng.choice(["read", "leave", "close", "abort", "cancel"])
        if habit == "close":
            await stream.aclose()
        elif habit == "leave":
            deltas = aiter(stream)
            await anext(deltas)
            await deltas.aclose()  # type: ignore[attr-defined]
        elif habit == "abort":
            await stream.wait_ready()
            await bench.front.abort(stream.request_id)
            await outcome(stream)
        elif habit == "cancel":
            reader = asyncio.create_task(collect(stream))
            await stream.wait_ready()
            reader.cancel()
            await asyncio.wait([reader])
        else:
            deltas_read, error = await outcome(stream)
            assert error is None
            ended = sum(d.finish_reason is not None for d in deltas_read)
            assert ended == len(stream.journal.choices)
        assert stream.ended
        return habit

    habits = await asyncio.gather(*(client(i) for i in range(40)))
    assert {"read", "leave", "close"} <= set(habits)
    snapshot = bench.front.snapshot()
    assert snapshot.num_accepted == sum(snapshot.num_ended.values()) == 40
    assert snapshot.num_inflight_reqs == snapshot.num_inflight_tokens == 0
    assert snapshot.num_divergences == 0
