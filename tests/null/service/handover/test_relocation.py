"""Requests move off instances that leave or are too slow, while they run; and a move is tried once more."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.null.service.conftest import House, byte_ids, collect, say, tokens_of, turns
from tests.null.service.handover.conftest import (
    TELLS_ENDPOINTS,
    Pair,
    advance,
    finish,
    kinds,
    make_pair,
    submits,
)
from xllm.errors import ErrorInfo
from xllm.service.handover.links import PROBE_EVERY
from xllm.service.live import LiveRequest
from xllm.testing.fake_engine import SampleEngine
from xllm.types import EngineSnapshot
from xllm.wire.messages import Abort, CancelTransfer, Move, Stats, Submit

SCRIPT = "a somewhat longer answer"
WHOLE = (*byte_ids(SCRIPT), 2)
FULL = ErrorInfo(kind="CapacityError", code="queue_full", message="full", retry_after_s=2.0)
NO_ROOM = ErrorInfo(kind="CapacityError", code="no_pages", message="no pages are free")
COST = (1.0, 0.1, 0.0, 1.0, 0.0)


async def running_on_d(pair: Pair, num: int, **params: object) -> list[LiveRequest]:
    """Requests that have been handed over and have drawn there."""
    streams = []
    for _ in range(num):
        num_before = len(submits(pair.d))
        stream = await pair.started(1, **params)
        await pair.d.saw(Submit, num_before + 1)
        streams.append(stream)
    for stream in streams:
        await advance(pair.d, stream, 2)
    return streams


def moved_from(engine: SampleEngine) -> list[str]:
    return [m.request_id for m in engine.received if isinstance(m, Move)]


# -- draining ---------------------------------------------------------------------------------------------


async def test_a_drain_moves_everything_a_few_at_a_time_and_computes_nothing_again(
    house: House, mode: str
) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    streams = await running_on_d(pair, 11)
    heir = await pair.more("d2", script=say(SCRIPT))
    drained = asyncio.create_task(house.front.drain_instance("d", 600.0))
    await pair.d.saw(Move, 8)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(moved_from(pair.d)) == 8, "more at a time would all be late"
    for _ in range(1000):
        pair.d.step()
        heir.step()
        await asyncio.sleep(0)
    await drained
    assert sorted(moved_from(pair.d)) == sorted(s.request_id for s in streams)
    assert {s.transfer_id != "" for s in submits(heir)} == {True}
    await finish(heir, streams=tuple(streams))
    for stream in streams:
        assert tokens_of(await collect(stream)) == WHOLE
    assert house.front.snapshot().num_moves == {}
    assert house.front.snapshot().num_handovers["drain", "done"] == 11


async def test_what_is_still_in_its_prompt_moves_when_that_is_done(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.d.crash()
    await turns(lambda: not any(i.alive for i in house.front.snapshot().instances if i.name == "d"))
    stream = await pair.started()
    assert kinds(pair.p, Move) == []
    heir = await pair.more("q", script=say(SCRIPT))
    drained = asyncio.create_task(house.front.drain_instance("p", 600.0))
    await pair.p.saw(Move)
    await advance(pair.p, stream, 1)
    await drained
    await finish(heir, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_without_a_way_for_pages_a_drain_waits_as_ever(house: House) -> None:
    engine = await house.engine(name="a", auto=False, script=say(SCRIPT))
    await house.engine(name="b", auto=False, script=say(SCRIPT), join={"about": TELLS_ENDPOINTS})
    stream = await house.submit()
    await engine.saw(Submit)
    drained = asyncio.create_task(house.front.drain_instance("a", 600.0))
    await finish(engine, streams=(stream,))
    await drained
    assert kinds(engine, Move) == []


async def test_what_recomputes_faster_than_it_moves_is_left_alone_until_the_drain_is_due(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xllm.decisions")
    pair = await make_pair(house, script=say(SCRIPT))
    heavy = 10**10
    for instance in house.front._catalogue.instances():
        instance.card = _with_pages(instance.card, heavy)
    (stream,) = await running_on_d(pair, 1)
    heir = await pair.more("d2", script=say(SCRIPT))
    _tell_cost(house, "d2")
    drained = asyncio.create_task(house.front.drain_instance("d", 4.0))
    await asyncio.sleep(0)
    house.pass_time(2.0)
    assert moved_from(pair.d) == []
    (line,) = [r.getMessage() for r in caplog.records if ", drain, from d to d2" in r.getMessage()]
    assert "recompute" in line
    assert "migrate: 10001.0 ms" in line
    house.pass_time(2.4)
    await drained
    assert house.front.snapshot().num_moves == {"drain": 1}
    # What was asked to wait there is now computed where the router says.
    await turns(lambda: len(submits(pair.p)) + len(submits(heir)) == 2)
    pair.p.hands_over = False
    await finish(pair.p, heir, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_a_drain_that_is_due_takes_what_is_on_its_way_to_where_it_was_going(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    (stream,) = await running_on_d(pair, 1)
    pair.d.hands_over = False
    heir = await pair.more("d2", script=say(SCRIPT))
    drained = asyncio.create_task(house.front.drain_instance("d", 1.0))
    (move,) = await pair.d.saw(Move)
    assert isinstance(move, Move)
    house.pass_time(1.2)
    await drained
    (submit,) = await heir.saw(Submit)
    assert isinstance(submit, Submit)
    assert submit.transfer_id == move.transfer_id
    await finish(heir, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_nobody_but_the_target_is_left_and_it_refuses(house: House) -> None:
    """The client has had its first tokens, so that a full instance is no answer to it."""
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started(1)
    pair.d.refusal = FULL
    drained = asyncio.create_task(house.front.drain_instance("p", 600.0))
    await asyncio.sleep(0)
    pair.p.hands_over = True
    await advance(pair.p, stream, 2)
    await drained
    await pair.d.saw(Submit)
    await turns(lambda: house.front.snapshot().num_waiting == 1)
    pair.d.refusal = None
    house.pass_time(0.4)
    await finish(pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_nothing_is_moved_to_an_instance_that_begins_to_leave(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started(1)
    await pair.p.saw(Move)
    await house.front.drain_instance("d", 10.0)
    await pair.p.saw(CancelTransfer)
    assert pair.watcher.outcomes == [("failed", "target_gone")]
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


# -- once more --------------------------------------------------------------------------------------------


async def test_a_failed_move_after_the_prompt_is_tried_on_another_instance_once(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    for name in ("d2", "d3"):
        await pair.more(name, script=say(SCRIPT))
    pair.p.move_error = NO_ROOM
    stream = await pair.started(1)
    await turns(lambda: len(pair.watcher.records) >= 1)
    house.pass_time(0.2)
    await pair.p.saw(Move, 2)
    await advance(pair.p, stream, 2)
    await turns(lambda: len(pair.watcher.records) >= 2)
    house.pass_time(1.0)
    assert [r.target for r in pair.watcher.records] == ["d", "d2"]
    assert len(moved_from(pair.p)) == 2
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_a_link_that_is_slower_than_computing_is_not_used_but_looked_at_now_and_then(
    house: House,
) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    for instance in house.front._catalogue.instances():
        instance.card = _with_pages(instance.card, 1_000_000)
    _tell_cost(house, "d")
    for size in (1, 2, 3, 4):
        house.front._links.observe("p", "d", size * 1_000_000, size * 10_000.0)
    for _ in range(PROBE_EVERY):
        stream = await pair.started(1)
        await finish(pair.p, pair.d, streams=(stream,))
    assert len(moved_from(pair.p)) == 1
    assert house.front.snapshot().num_handovers["prefill", "skipped"] == PROBE_EVERY - 1


# -- asked, and rebalanced ----------------------------------------------------------------------------------


async def test_a_running_request_can_be_moved_by_name(house: House, mode: str) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    (stream,) = await running_on_d(pair, 1)
    heir = await pair.more("d2", script=say(SCRIPT))
    move = house.front._dispatch.move
    assert move("nobody", "d2") == "no_such_request"
    assert move(stream.request_id, "nowhere") == "target_gone"
    assert move(stream.request_id, "d") == "same_instance"
    assert move(stream.request_id, "d2") == ""
    assert move(stream.request_id, "d2") == "under_way"
    await pair.d.saw(Move)
    await advance(pair.d, stream, 3)
    await heir.saw(Submit)
    await finish(heir, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert pair.watcher.records[-1].reason == "asked"


@pytest.mark.parametrize("role_control", ["static", "adaptive"])
async def test_a_slow_instance_gives_a_request_to_a_fast_one_if_roles_adapt(
    house: House, role_control: str
) -> None:
    pair = await make_pair(house, script=say(SCRIPT), role_control=role_control, slo_tpot_ms=5.0)
    streams = await running_on_d(pair, 3)
    heir = await pair.more("e", script=say(SCRIPT))
    for name, engine, num in (("d", pair.d, 10), ("e", heir, 0), ("p", pair.p, 10)):
        snapshot = EngineSnapshot(num_decoding=num, cost=COST)
        engine.tell(Stats(snapshot=snapshot))
        await turns(lambda: _instance(house, name).snapshot.num_decoding == num)  # noqa: B023
    house.pass_time(0.2)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(moved_from(pair.d)) == (role_control == "adaptive")
    if role_control == "adaptive":
        house.pass_time(0.4)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(moved_from(pair.d)) == 1, "the first must show before the next"
    await finish(pair.d, heir, streams=tuple(streams))
    for stream in streams:
        assert tokens_of(await collect(stream)) == WHOLE
    assert kinds(pair.d, Abort).count("Abort") == (role_control == "adaptive")


def _instance(house: House, name: str):  # type: ignore[no-untyped-def]
    instance = house.front._catalogue.get(name)
    assert instance is not None
    return instance


def _with_pages(card, page_bytes: int):  # type: ignore[no-untyped-def]
    return msgspec.structs.replace(card, page_bytes=page_bytes)


def _tell_cost(house: House, name: str) -> None:
    instance = _instance(house, name)
    instance.snapshot = EngineSnapshot(cost=COST)
