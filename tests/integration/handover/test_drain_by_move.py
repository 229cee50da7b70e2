"""An instance that leaves hands its running requests over while they run: no token is computed again.

Real processes on the null device, whose tokens are hashes of all KV that a row sees: a wrong page shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from tests.faultlab.lab import MODEL, model_dir
from xllm.clock import SystemClock
from xllm.config import CacheConfig, EngineConfig, FrontConfig, ModelConfig, PlatformConfig
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.live import LiveRequest
from xllm.service.local import LocalService
from xllm.types import PAGE_SIZE, SamplingParams

PROMPTS = [tuple(3 + (7 * i + 31 * n) % 250 for i in range(40 + 60 * n)) for n in range(6)]
NUM_TOKENS = 400
BUFFER_TOKENS = 32
"""For a reader that does not read; then its engine's credit ends. So no stream can end before it may."""


@asynccontextmanager
async def service(folder: Path, num: int, mode: Literal["push", "pull"]) -> AsyncIterator[LocalService]:
    engine = EngineConfig(
        model=ModelConfig(model=str(model_dir(folder)), load_format="dummy", served_model_name=(MODEL,)),
        cache=CacheConfig(num_pages=256),
        platform=PlatformConfig(platform="null"),
    )
    config = FrontConfig(
        router_policy="round-robin",
        transfer_mode=mode,
        max_queue_delay_s=0,
        stream_buffer_tokens=BUFFER_TOKENS,
        slow_reader_timeout_s=120,
        suspect_floor_s=60,
    )
    made = await LocalService.start([engine] * num, config, SystemClock())
    try:
        async with asyncio.timeout(30):
            while len(made.front.snapshot().instances) < num:
                await asyncio.sleep(0.01)
        yield made
    finally:
        await made.close()


async def ask(front: Front) -> list[LiveRequest]:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.0, seed=3, n=1)
    return [
        await front.submit(RequestDraft(model=MODEL, prompt_token_ids=prompt, params=params))
        for prompt in PROMPTS
    ]


async def said(stream: LiveRequest, may_end: asyncio.Event | None = None) -> tuple[int, ...]:
    """All of it; after the first tokens not before `may_end`."""
    tokens: list[int] = []
    async for delta in stream:
        tokens.extend(delta.token_ids)
        if may_end is not None and len(tokens) >= 5:
            await may_end.wait()
    return tuple(tokens)


@pytest.mark.parametrize("mode", ["push", "pull"])
async def test_a_drained_instance_is_empty_at_once_and_every_stream_goes_on(
    tmp_path: Path, mode: Literal["push", "pull"]
) -> None:
    async with service(tmp_path, 1, mode) as alone:
        wanted = await asyncio.gather(*map(said, await ask(alone.front)))
    async with service(tmp_path, 2, mode) as pair:
        front = pair.front
        streams = await ask(front)
        moved = asyncio.Event()
        readers = [asyncio.create_task(said(stream, moved)) for stream in streams]
        async with asyncio.timeout(30):
            while min(stream.journal.num_committed for stream in streams) < 5:
                await asyncio.sleep(0)
        on_it = [i.num_requests for i in front.snapshot().instances if i.name == "engine-0"]
        before = {i.name: i.engine.prompt_tokens for i in front.snapshot().instances}
        assert on_it == [3]
        async with asyncio.timeout(30):
            await front.drain_instance("engine-0", 30.0)
        assert all(not stream.ended for stream in streams), "they had ended before they could be moved"
        moved.set()
        assert await asyncio.gather(*readers) == wanted
        snapshot = front.snapshot()
        assert snapshot.num_handovers == {("drain", "done"): 3}
        assert snapshot.num_moves == {}
        computed = {i.name: i.engine.prompt_tokens - before[i.name] for i in snapshot.instances}
        assert computed["engine-1"] < PAGE_SIZE, "what was moved was computed again"
