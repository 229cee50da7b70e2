"""Pulses: an engine that hangs is told from one that is busy, and from one that is idle."""

from __future__ import annotations

import asyncio
import threading

from tests.null.wire.peers import FrontEnd, join
from xllm.engine.plan import SequencePlan
from xllm.testing.instance_thread import null_instance
from xllm.testing.null_engine import null_engine, spec
from xllm.wire.messages import Frames, Pulse, Stats


async def pulse(front: FrontEnd) -> Pulse:
    while True:
        message = await front.next()
        if isinstance(message, Pulse):
            return message


async def test_a_hanging_step_shows_in_pulses_that_do_not_advance() -> None:
    engine = null_engine()
    gate, hanging = threading.Event(), threading.Event()

    def hang(entry: SequencePlan) -> None:
        if len(entry.tokens) > 100:
            hanging.set()
            gate.wait(20.0)

    layers = iter(range(1, 1000))
    engine.runner.fault = hang
    engine.core.progress.layer = lambda: next(layers)
    server = null_instance(engine)
    front = await join(server)
    idle = await pulse(front)
    assert (idle.busy, idle.layer, idle.step_age_ms) == (False, 0, 0.0)
    await front.submit(spec("r", (1,) * 200, max_tokens=3, ignore_eos=True))
    assert await asyncio.to_thread(hanging.wait, 20.0)
    first, second = await pulse(front), await pulse(front)
    assert first.busy
    assert second.busy
    assert second.step == first.step
    assert second.step_age_ms > first.step_age_ms
    # A runner that counts layers shows that it still computes.
    assert second.layer > first.layer
    gate.set()
    await front.until_last("r")
    after = await pulse(front)
    assert after.step > second.step
    assert not after.busy
    await front.stream.close()
    server.stop()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_an_engine_waiting_for_its_fronts_log_is_not_busy() -> None:
    """Otherwise a slow reader would make it suspect."""
    server = null_instance()
    front = await join(server)
    await front.submit(spec("r", (1, 2, 3), max_tokens=100, ignore_eos=True))
    while sum(len(f.tokens) for f in front.frames) < 16:
        await front.next_frames(commit=False)
    assert not (await pulse(front)).busy
    assert server.snapshot.num_requests == 1
    await front.stream.close()
    server.stop()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_a_front_without_requests_hears_how_busy_the_engine_is() -> None:
    server = null_instance()
    worker, watcher = await join(server), await join(server)
    seen = asyncio.Event()

    async def work() -> None:
        while not seen.is_set():
            await worker.submit(spec("r", (1, 2, 3), max_tokens=500, ignore_eos=True))
            await worker.until_last("r")

    working = asyncio.create_task(work())
    while not seen.is_set():
        message = await watcher.next()
        assert not isinstance(message, Frames)
        if isinstance(message, Stats) and message.snapshot.num_requests == 1:
            assert message.snapshot.num_decoding == 1
            seen.set()
    await working
    for front in (worker, watcher):
        await front.stream.close()
    server.stop()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


def test_steps_teach_what_the_next_one_takes() -> None:
    engine = null_engine()
    assert engine.core.snapshot().cost == ()
    for i in range(8):
        prompt = tuple(range(3 + i, 103 + 9 * i))
        engine.core.submit(spec(str(i), prompt, max_tokens=8, ignore_eos=True))
        engine.run()
    told = engine.core.snapshot()
    assert len(told.cost) == 5
    engine.core.submit(spec("r", (1,) * 300, max_tokens=2, ignore_eos=True))
    engine.step()
    # This step's prediction, from the coefficients that were told before it.
    assert engine.core.progress.predicted_ms > 0
