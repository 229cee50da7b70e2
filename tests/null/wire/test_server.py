"""An instance on the network: several fronts at once, each with its own requests, ids and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.null.wire.peers import join
from xllm.engine.server import InstanceServer
from xllm.testing.instance_thread import null_instance
from xllm.testing.null_engine import NullEngine, null_engine, spec
from xllm.types import FinishReason
from xllm.wire.messages import Abort, Drain, Frames, Stats


@pytest.fixture
async def served() -> AsyncIterator[tuple[InstanceServer, NullEngine]]:
    engine = null_engine(num_pages=64)
    server = null_instance(engine)
    yield server, engine
    server.stop()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_two_fronts_use_the_same_id_and_get_what_is_theirs(
    served: tuple[InstanceServer, NullEngine],
) -> None:
    server, _ = served
    one, two = await join(server), await join(server)
    assert one.ready.card == server.ready.card
    await one.submit(spec("same", tuple(range(10, 90)), max_tokens=40, ignore_eos=True))
    await two.submit(spec("same", tuple(range(50, 150)), max_tokens=30, ignore_eos=True))
    await asyncio.gather(one.until_last("same"), two.until_last("same"))
    alone = null_engine()
    alone.core.submit(spec("a", tuple(range(10, 90)), max_tokens=40, ignore_eos=True))
    alone.core.submit(spec("b", tuple(range(50, 150)), max_tokens=30, ignore_eos=True))
    frames = alone.run()
    assert one.tokens("same") == tuple(t for f in frames if f.request_id == "a" for t in f.tokens)
    assert two.tokens("same") == tuple(t for f in frames if f.request_id == "b" for t in f.tokens)
    for end in (one, two):
        await end.stream.close()


async def test_one_front_cannot_end_the_others_request(served: tuple[InstanceServer, NullEngine]) -> None:
    server, _ = served
    one, two = await join(server), await join(server)
    await one.submit(spec("r", (5, 6, 7), max_tokens=100, ignore_eos=True))
    await one.next_frames()
    await two.stream.send(Abort(request_id="r"))
    await two.submit(spec("later", (5,), max_tokens=2, ignore_eos=True))
    await two.until_last("later")  # so the abort was handled
    await one.until_last("r")
    assert one.last("r").finish_reason is FinishReason.LENGTH
    for end in (one, two):
        await end.stream.close()


async def test_a_front_that_leaves_takes_its_requests_along_and_nothing_else(
    served: tuple[InstanceServer, NullEngine],
) -> None:
    server, engine = served
    one, two = await join(server), await join(server)
    # Nothing is committed, so that it still runs and owns pages when its front leaves.
    await one.submit(spec("dies", tuple(range(3, 200)), max_tokens=500, ignore_eos=True))
    await one.next_frames(commit=False)
    await two.submit(spec("lives", (9, 8, 7), max_tokens=300, ignore_eos=True))
    await two.next_frames()
    assert server.snapshot.num_requests == 2
    await one.stream.close()
    await two.until_last("lives")
    assert len(two.tokens("lives")) == 300
    three = await join(server)
    message = await three.next()
    while not isinstance(message, Stats):
        message = await three.next()
    assert (message.snapshot.num_requests, message.snapshot.owned_pages) == (0, 0)
    for end in (two, three):
        await end.stream.close()


async def test_draining_is_told_to_all_at_once_refuses_new_requests_and_finishes_old_ones() -> None:
    server = null_instance()
    one, two = await join(server), await join(server)
    await one.submit(spec("old", (5, 6), max_tokens=60, ignore_eos=True))
    await one.next_frames()
    server.drain()
    while not two.draining:
        await two.next()
    await two.submit(spec("new", (5, 6), max_tokens=60))
    await two.until_last("new")
    error = two.last("new").error
    assert error is not None
    assert error.code == "draining"
    await one.until_last("old")
    assert one.last("old").finish_reason is FinishReason.LENGTH
    for end in (one, two):
        while await end.stream.receive() is not None:
            pass
        await end.stream.close()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_draining_ends_after_its_grace_and_says_nothing_of_what_still_runs() -> None:
    """No terminal event: the fronts see a lost instance and go on elsewhere."""
    server = null_instance(grace_s=0.0)
    one = await join(server)
    await one.submit(spec("stuck", (5, 6), max_tokens=500, ignore_eos=True))
    await one.next_frames(commit=False)
    server.drain()
    while (message := await one.stream.receive()) is not None:
        if isinstance(message, Frames):
            assert not any(f.last for f in message.frames)
    await one.stream.close()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_a_front_that_drains_gets_its_rest_and_the_engine_serves_the_others_on(
    served: tuple[InstanceServer, NullEngine],
) -> None:
    server, _ = served
    one, two = await join(server), await join(server)
    await one.submit(spec("old", (5, 6), max_tokens=60, ignore_eos=True))
    await one.next_frames()
    await one.stream.send(Drain())
    await one.submit(spec("new", (5, 6), max_tokens=60))
    await one.until_last("old", "new")
    error = one.last("new").error
    assert error is not None
    assert error.code == "draining"
    while await one.stream.receive() is not None:
        pass
    await two.submit(spec("r", (5, 6), max_tokens=6, ignore_eos=True))
    await two.until_last("r")
    assert not two.draining
    for end in (one, two):
        await end.stream.close()
