"""A request whose prompt is computed at one instance goes on at another, and its client sees one stream."""

from __future__ import annotations

import asyncio

import pytest

from tests.null.service.conftest import (
    House,
    byte_ids,
    collect,
    finishes,
    outcome,
    say,
    text_of,
    tokens_of,
    turns,
)
from tests.null.service.handover.conftest import (
    TELLS_ENDPOINTS,
    advance,
    finish,
    kinds,
    make_pair,
    specs,
    submits,
)
from xllm.errors import AbortedError, ErrorInfo
from xllm.testing.fake_engine import SampleEngine
from xllm.types import RequestSpec
from xllm.wire.messages import Abort, CancelTransfer, Move, Moved, Pulse, Submit

SCRIPT = "one two STOP three"
WHOLE = (*byte_ids(SCRIPT), 2)
FULL = ErrorInfo(kind="CapacityError", code="queue_full", message="full", retry_after_s=2.0)
DRAINING = ErrorInfo(kind="UnavailableError", code="draining", message="going", retry_after_s=1.0)
LOST_BYTES = ErrorInfo(kind="UnavailableError", code="checksum", message="a page arrived damaged")


# -- the usual way --------------------------------------------------------------------------------------


async def test_the_client_sees_one_stream_and_its_usage_once(house: House, mode: str) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    stream = await pair.started(1)
    (moved_to,) = await pair.d.saw(Submit)
    assert isinstance(moved_to, Submit)
    (move,) = await pair.p.saw(Move)
    assert isinstance(move, Move)
    await finish(pair.d, streams=(stream,))
    deltas = await collect(stream)
    assert tokens_of(deltas) == WHOLE
    assert finishes(deltas) == {0: ("stop", None)}
    assert stream.usage().completion_tokens == len(WHOLE)
    assert (moved_to.spec.attempt, moved_to.spec.emitted) == (1, (byte_ids("o"),))
    assert moved_to.transfer_id == move.transfer_id
    assert len(move.transfer_id) == 32
    assert (move.mode, move.attempt) == (mode, 0)
    # The bytes' way is told to whoever opens the connection, and to nobody else.
    endpoints = TELLS_ENDPOINTS.endpoints
    assert move.endpoints == (endpoints if mode == "push" else ())
    assert moved_to.sources == (endpoints if mode == "pull" else ())
    assert [m.attempt for m in await pair.p.saw(Abort)] == [0]
    assert kinds(pair.p, CancelTransfer) == kinds(pair.d, CancelTransfer, Abort) == []
    assert pair.watcher.outcomes == [("done", "")]
    assert pair.watcher.placed == [("p", 0), ("d", 1)]
    assert pair.watcher.resumed == ["d"]
    assert pair.watcher.moved == [], "a hand-over is no loss"


async def test_move_follows_its_submit_at_once_and_the_abort_follows_the_new_submit(house: House) -> None:
    pair = await make_pair(house)
    stream = await pair.started()
    await pair.p.saw(Move)
    assert kinds(pair.p, Submit, Move, Abort) == ["Submit", "Move"]
    assert submits(pair.d) == []
    await advance(pair.p, stream, 1)
    await pair.d.saw(Submit)
    await pair.p.saw(Abort)
    assert pair.p.request_ids == ()
    await finish(pair.d, streams=(stream,))


async def test_with_pull_the_source_keeps_the_pages_until_the_target_has_answered(house: House) -> None:
    pair = await make_pair(house, transfer_mode="pull")
    stream = await pair.started(1)
    await pair.d.saw(Submit)
    await asyncio.sleep(0)
    assert kinds(pair.p, Abort) == []
    assert pair.p.request_ids == (stream.request_id,)
    await advance(pair.d, stream, 2)
    await pair.p.saw(Abort)
    await finish(pair.d, streams=(stream,))


async def test_an_instance_whose_pages_are_still_fetched_is_not_idle(house: House) -> None:
    pair = await make_pair(house, transfer_mode="pull")
    stream = await pair.started(1)
    await pair.d.saw(Submit)
    drained = asyncio.create_task(house.front.drain_instance("p", 60.0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not drained.done()
    await advance(pair.d, stream, 2)
    await drained
    await finish(pair.d, streams=(stream,))


async def test_one_token_is_not_worth_a_move_and_the_same_instance_needs_none(house: House) -> None:
    pair = await make_pair(house)
    stream = await pair.started(max_tokens=1)
    await finish(pair.p, streams=(stream,))
    assert kinds(pair.p, Move) == []
    assert house.front.snapshot().num_handovers == {}


async def test_choices_that_have_ended_stay_ended(house: House) -> None:
    def script(spec: RequestSpec, choice: int) -> tuple[int, ...]:
        return (2,) if choice == 0 else (*byte_ids("abcdef"), 2)

    pair = await make_pair(house, script=script)
    stream = await pair.started(2, n=2)
    await pair.d.saw(Submit)
    await finish(pair.d, streams=(stream,))
    deltas = await collect(stream)
    assert (tokens_of(deltas, 0), text_of(deltas, 1)) == ((2,), "abcdef")
    (spec,) = specs(pair.d)
    assert (spec.ended, spec.emitted) == ((0,), ((2,), byte_ids("a")))
    assert stream.usage().completion_tokens == 8


async def test_a_short_answer_ends_where_it_began(house: House) -> None:
    pair = await make_pair(house, script=say("a"))
    pair.p.hands_over = False
    stream = await pair.started()
    await pair.p.saw(Move)
    await finish(pair.p, streams=(stream,))
    assert text_of(await collect(stream)) == "a"
    await pair.d.saw(CancelTransfer)
    assert pair.watcher.outcomes == [("unneeded", "ended")]
    assert house.front.snapshot().num_transfer_failures == {}


async def test_a_stop_string_found_while_it_moves_ends_it_on_both_sides(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started(3, stop="two")
    await finish(pair.p, streams=(stream,))
    assert text_of(await collect(stream)) == "one "
    await pair.p.saw(Abort)
    ids = {m.transfer_id for e in (pair.p, pair.d) for m in await e.saw(CancelTransfer)}  # type: ignore[union-attr]
    assert len(ids) == 1


async def test_a_stop_string_that_spans_the_hand_over_is_found_and_never_shown(house: House) -> None:
    pair = await make_pair(house, script=say("STOP three"))
    stream = await pair.started(1, stop="STOP")
    await pair.d.saw(Submit)
    await finish(pair.d, streams=(stream,))
    deltas = await collect(stream)
    assert text_of(deltas) == ""
    assert finishes(deltas) == {0: ("stop", "STOP")}


@pytest.mark.parametrize("moved", [False, True])
async def test_a_client_that_leaves_frees_both_sides(house: House, mode: str, moved: bool) -> None:
    pair = await make_pair(house, transfer_mode=mode)
    pair.p.hands_over = moved
    stream = await pair.started(1)
    if moved:
        await pair.d.saw(Submit)
    else:
        await pair.p.saw(Move)
    stream.leave()
    _, error = await outcome(stream)
    assert isinstance(error, AbortedError)
    await pair.p.saw(Abort)
    await (pair.d.saw(Abort) if moved else pair.d.saw(CancelTransfer))
    if not moved:
        await pair.p.saw(CancelTransfer)
    await turns(lambda: not pair.p.request_ids and not pair.d.request_ids)
    assert house.front.snapshot().num_moving == 0


# -- the transfer fails ------------------------------------------------------------------------------------


async def test_a_failed_transfer_leaves_the_request_where_it_is(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.move_error = LOST_BYTES
    stream = await pair.started(1)
    await turns(lambda: bool(pair.watcher.records))
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert submits(pair.d) == []
    assert set(pair.watcher.outcomes) == {("failed", "checksum")}
    assert set(house.front.snapshot().num_transfer_failures) == {"checksum"}
    # It holds pages for what will not come.
    await pair.d.saw(CancelTransfer)
    assert house.front.snapshot().num_moves == {}


async def test_an_engine_cannot_make_up_codes_without_end(house: House) -> None:
    pair = await make_pair(house)
    for code in [*(f"c{i}" for i in range(40)), "not a code", "x" * 99]:
        pair.p.move_error = ErrorInfo(kind="InternalError", code=code, message="")
        stream = await pair.started(1)
        await finish(pair.p, streams=(stream,))
    failures = house.front.snapshot().num_transfer_failures
    assert len(failures) <= 33
    assert sum(failures.values()) == len(pair.watcher.records) >= 42
    assert failures["other"] >= 10


async def test_a_move_without_an_answer_is_given_up_and_the_request_stays(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started()
    # While the prompt is computed nothing is overdue, however long that takes.
    await _pass_time(pair.house, 30.0, pair.p, pair.d)
    assert house.front.snapshot().num_moving == 1
    await advance(pair.p, stream, 1)
    await _pass_time(pair.house, 1.6, pair.p, pair.d)
    assert house.front.snapshot().num_moving == 1
    await _pass_time(pair.house, 0.6, pair.p, pair.d)
    assert house.front.snapshot().num_moving == 0
    for engine in (pair.p, pair.d):
        assert len(await engine.saw(CancelTransfer)) == 1
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert house.front.snapshot().num_transfer_failures == {"timeout": 1}


async def test_a_success_that_comes_too_late_does_not_leave_the_request_holding(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started(1)
    (move,) = await pair.p.saw(Move)
    assert isinstance(move, Move)
    # The source has said yes just before it hears that it was given up.
    await _pass_time(pair.house, 2.4, pair.p, pair.d)
    pair.p._requests[stream.request_id].holds = True
    pair.p.tell(Moved(request_id=stream.request_id, attempt=0, transfer_id=move.transfer_id))
    await turns(lambda: pair.house.front.snapshot().num_moves == {"handover": 1})
    pair.p.hands_over = True
    await turns(lambda: len(submits(pair.p)) + len(submits(pair.d)) > 1)
    await finish(pair.p, pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_words_about_moves_that_nobody_ordered_change_nothing(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    stream = await pair.started(1)
    await pair.d.saw(Submit)
    await advance(pair.d, stream, 3)
    rid = stream.request_id
    for engine in (pair.p, pair.d):
        engine.tell(Moved(request_id=rid, attempt=0, transfer_id="00"))
        engine.tell(Moved(request_id=rid, attempt=7, transfer_id="00"))
        engine.tell(Moved(request_id="nobody", attempt=0, transfer_id="00"))
    await finish(pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert house.front.snapshot().num_moves == {}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -5.0])
async def test_numbers_that_make_no_sense_are_not_counted(house: House, number: float) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started(1)
    (move,) = await pair.p.saw(Move)
    assert isinstance(move, Move)
    pair.p._requests[stream.request_id].holds = True
    pair.p.tell(
        Moved(
            request_id=stream.request_id,
            attempt=0,
            transfer_id=move.transfer_id,
            num_bytes=-1,
            transfer_ms=number,
            exposed_ms=number,
        )
    )
    await pair.d.saw(Submit)
    (record,) = pair.watcher.records
    assert (record.num_bytes, record.transfer_ms, record.exposed_ms) == (0, 0.0, 0.0)
    assert record.hidden_share is None
    await finish(pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


# -- somebody dies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
async def test_the_source_dies_before_it_has_answered(house: House, mode: str, num_tokens: int) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    pair.p.hands_over = False
    stream = await pair.started(num_tokens)
    (move,) = await pair.p.saw(Move)
    assert isinstance(move, Move)
    pair.p.crash()
    (submit,) = await pair.d.saw(Submit)
    assert isinstance(submit, Submit)
    # Of a prompt that was not through there is nothing to go on with; after that everything may be there.
    assert submit.transfer_id == (move.transfer_id if num_tokens else "")
    assert kinds(pair.d, CancelTransfer) == ([] if num_tokens else ["CancelTransfer"])
    await finish(pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert stream.usage().completion_tokens == len(WHOLE)
    assert pair.watcher.outcomes == [("unneeded", "lost")]


async def test_pages_are_not_awaited_where_nobody_goes(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.p.hands_over = False
    stream = await pair.started(2)
    await pair.p.saw(Move)
    pair.d.refusal = FULL
    pair.p.crash()
    await pair.d.saw(Submit)
    heir = await pair.more("p2", script=say(SCRIPT))
    (submit,) = await heir.saw(Submit)
    assert isinstance(submit, Submit)
    assert submit.transfer_id == ""
    pair.d.refusal = None
    await finish(heir, pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_the_target_dies_before_the_source_has_answered(house: House, mode: str) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    pair.p.hands_over = False
    stream = await pair.started(2)
    pair.d.crash()
    await pair.p.saw(CancelTransfer)
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert pair.watcher.outcomes == [("failed", "target_gone")]
    assert len(submits(pair.p)) == 1


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
async def test_the_target_dies_after_the_switch(house: House, mode: str, num_tokens: int) -> None:
    """Before its first frame (1) and after."""
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    stream = await pair.started(1)
    await pair.d.saw(Submit)
    await advance(pair.d, stream, num_tokens)
    pair.d.crash()
    submit = (await pair.p.saw(Submit, 2))[-1]
    assert isinstance(submit, Submit)
    assert (submit.spec.attempt, submit.transfer_id) == (2, "")
    # The old attempt was ended before: an engine has a request once.
    assert kinds(pair.p, Submit, Abort) == ["Submit", "Abort", "Submit"]
    await finish(pair.p, streams=(stream,))
    deltas = await collect(stream)
    assert tokens_of(deltas) == WHOLE
    assert stream.usage().completion_tokens == len(WHOLE)


async def test_the_source_dies_after_the_switch(house: House, mode: str) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    stream = await pair.started(1)
    await pair.d.saw(Submit)
    pair.p.crash()
    await turns(lambda: not any(i.alive for i in house.front.snapshot().instances if i.name == "p"))
    await finish(pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert len(submits(pair.d)) == 1
    assert pair.watcher.moved == []


async def test_both_die_and_a_third_goes_on(house: House, mode: str) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    pair.p.hands_over = False
    stream = await pair.started(2)
    pair.p.crash()
    pair.d.crash()
    heir = await pair.more("heir", script=say(SCRIPT))
    await heir.saw(Submit)
    await finish(heir, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


@pytest.mark.parametrize("refusal", [FULL, DRAINING])
async def test_a_target_that_refuses_costs_the_client_nothing(
    house: House, mode: str, refusal: ErrorInfo
) -> None:
    pair = await make_pair(house, script=say(SCRIPT), transfer_mode=mode)
    pair.d.refusal = refusal
    stream = await pair.started(1)
    await pair.d.saw(Submit)
    await pair.p.saw(Submit, 2)
    assert kinds(pair.p, Submit, Abort)[:3] == ["Submit", "Abort", "Submit"]
    pair.p.hands_over = False
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_a_target_that_is_suspected_when_the_answer_comes_gets_nothing(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT), pulses=True)
    pair.p.hands_over = False
    stream = await pair.started(1)
    await pair.p.saw(Move)
    await _pass_time(house, 2.4, pair.p)
    assert pair.watcher.outcomes[0][1] in ("target_gone", "timeout")
    pair.p.hands_over = True
    await finish(pair.p, streams=(stream,))
    assert tokens_of(await collect(stream)) == WHOLE
    assert submits(pair.d) == []


async def test_a_source_that_is_suspected_loses_its_requests_to_the_target(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT), pulses=True)
    pair.p.hands_over = False
    stream = await pair.started(2)
    (move,) = await pair.p.saw(Move)
    assert isinstance(move, Move)
    # Its time to answer is over at the same moment; either way the request goes on elsewhere.
    await _pass_time(house, 2.4, pair.d)
    await pair.d.saw(Submit)
    await finish(pair.d, streams=(stream,))
    # It wakes and says that all went well: nobody waits for that any more.
    pair.p.tell(Moved(request_id=stream.request_id, attempt=0, transfer_id=move.transfer_id))
    assert tokens_of(await collect(stream)) == WHOLE


async def test_of_instances_that_cannot_exchange_pages_nothing_is_asked(house: House) -> None:
    pair = await make_pair(house, script=say(SCRIPT))
    pair.d.crash()
    await turns(lambda: not any(i.alive for i in house.front.snapshot().instances if i.name == "d"))
    other = await pair.more("d2", numerics="other", script=say(SCRIPT))
    stream = await pair.started(1)
    await finish(pair.p, streams=(stream,))
    assert kinds(pair.p, Move) == []
    assert submits(other) == []
    assert tokens_of(await collect(stream)) == WHOLE


async def _pass_time(house: House, seconds: float, *awake: SampleEngine) -> None:
    """As if the front had ticked all the while; those awake pulse."""
    for _ in range(round(seconds / 0.2)):
        for engine in awake:
            engine.tell(Pulse(step=engine.num_steps))
        for _ in range(6):
            await asyncio.sleep(0)
        house.pass_time(0.2)
