"""What a request may expect of the front, over a sample engine in memory."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
import pytest

from tests.null.service.conftest import (
    ASSETS,
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
from xllm.config import FrontConfig
from xllm.errors import (
    AbortedError,
    CapacityError,
    ConfigError,
    DeadlineError,
    ErrorInfo,
    InternalError,
    NotFoundError,
    RequestError,
    UnavailableError,
)
from xllm.service.front import Front
from xllm.service.router.base import Placement
from xllm.service.snapshot import NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.types import SLO, FinishReason
from xllm.wire.messages import CREDIT_WINDOW, Abort, Drain, Frame, Submit


async def test_text_tokens_and_usage_come_from_the_log(house: House) -> None:
    await house.engine(script=say("grüße"))
    stream = await house.submit("hello")
    deltas = await collect(stream)
    assert text_of(deltas) == "grüße"
    assert tokens_of(deltas) == (*byte_ids("grüße"), 2)
    assert finishes(deltas) == {0: ("stop", None)}
    assert stream.usage().prompt_tokens == 5
    assert stream.usage().completion_tokens == len("grüße".encode()) + 1


async def test_max_tokens_ends_with_length_and_shows_what_was_held_back(house: House) -> None:
    await house.engine(script=say("say STO"))
    deltas = await collect(await house.submit(max_tokens=7, stop="STOP"))
    assert text_of(deltas) == "say STO"
    assert finishes(deltas) == {0: ("length", None)}


@pytest.mark.parametrize("tokens_per_step", [1, 3, 16])
async def test_stop_string_cuts_log_text_and_usage_wherever_frames_end(
    house: House, tokens_per_step: int
) -> None:
    engine = await house.engine(script=say("one END two three four"), tokens_per_step=tokens_per_step)
    stream = await house.submit(stop=["END", "never"])
    deltas = await collect(stream)
    assert text_of(deltas) == "one "
    assert tokens_of(deltas) == byte_ids("one END")
    assert finishes(deltas) == {0: ("stop", "END")}
    assert stream.usage().completion_tokens == len("one END")
    assert [m.request_id for m in await engine.saw(Abort)] == [stream.request_id]


async def test_stop_string_is_shown_when_asked_for(house: House) -> None:
    await house.engine(script=say("one END two"))
    deltas = await collect(await house.submit(stop="END", include_stop_str_in_output=True))
    assert text_of(deltas) == "one END"


async def test_stop_string_waits_for_min_tokens(house: House) -> None:
    await house.engine(script=say("abXab Xcd"))
    deltas = await collect(await house.submit(stop="X", min_tokens=4))
    assert text_of(deltas) == "abXab "
    assert finishes(deltas) == {0: ("stop", "X")}


async def test_stop_string_ends_one_choice_and_the_others_go_on(house: House) -> None:
    engine = await house.engine(script=lambda spec, c: byte_ids(["a.bcdefgh" * 4, "xyz" * 8][c]))
    deltas = await collect(await house.submit(n=2, stop=".", max_tokens=24))
    assert text_of(deltas, 0) == "a"
    assert text_of(deltas, 1) == "xyz" * 8
    assert finishes(deltas) == {0: ("stop", "."), 1: ("length", None)}
    assert engine.num_steps >= 24


async def test_tokens_of_held_back_text_are_delivered_in_order(house: House) -> None:
    engine = await house.engine(script=say("ST-"), auto=False)
    stream = await house.submit(stop="STOP")
    deltas = aiter(stream)
    await engine.saw(Submit)
    engine.step()
    engine.step()
    first, second = await anext(deltas), await anext(deltas)
    assert (first.text, second.text) == ("", "")
    assert (*first.token_ids, *second.token_ids) == byte_ids("ST")
    engine.step()
    assert (await anext(deltas)).text == "ST-"
    await deltas.aclose()


async def test_without_detokenize_there_are_only_tokens(house: House) -> None:
    await house.engine(script=say("abc"))
    deltas = await collect(await house.submit(detokenize=False))
    assert text_of(deltas) == ""
    assert tokens_of(deltas) == (*byte_ids("abc"), 2)


async def test_open_parameters_are_resolved_before_the_engine_sees_them(house: House) -> None:
    engine = await house.engine(auto=False)
    await house.submit("hello", max_tokens=None, bad_words=("on",), stop="x")
    (submit,) = await engine.saw(Submit)
    params = submit.spec.params
    assert params.seed is not None
    assert params.max_tokens == 1024 - 5
    assert params.bad_words_token_ids
    assert len(params.bad_words_token_ids[0]) >= 1
    assert params.stop_strings == ("x",)


@pytest.mark.parametrize(
    ("control", "wanted"), [("static", SLO()), ("adaptive", SLO(ttft_ms=900.0, tpot_ms=80.0))]
)
async def test_objectives_that_nobody_asked_for_hold_where_roles_follow_them(
    control: Literal["static", "adaptive"], wanted: SLO
) -> None:
    clock = FakeClock()
    config = FrontConfig(role_control=control, slo_ttft_ms=900.0, slo_tpot_ms=80.0)
    house = House(clock=clock, front=Front(config, None, clock))
    engine = await house.engine()
    await collect(await house.submit("hello", max_tokens=2))
    (submit,) = await engine.saw(Submit)
    assert submit.spec.slo == wanted
    await house.front.close()
    await engine.close()


async def test_leaving_the_loop_aborts_at_once(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit()
    await engine.saw(Submit)
    engine.step()
    deltas = aiter(stream)
    await anext(deltas)
    await deltas.aclose()
    assert [m.request_id for m in await engine.saw(Abort)] == [stream.request_id]
    assert house.front.snapshot().num_inflight_reqs == 0


async def test_cancelling_the_consumer_aborts(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit()
    consumer = asyncio.create_task(collect(stream))
    await engine.saw(Submit)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert [m.request_id for m in await engine.saw(Abort)] == [stream.request_id]


async def test_aclose_without_reading_aborts_once(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit()
    await stream.aclose()
    await stream.aclose()
    await house.submit()
    await engine.saw(Submit, 2)
    assert len(await engine.saw(Abort)) == 1


async def test_abort_by_id_raises_aborted_after_what_was_delivered(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit()
    await engine.saw(Submit)
    engine.step()
    await stream.wait_ready()
    assert await house.front.abort(stream.request_id)
    assert not await house.front.abort(stream.request_id)
    deltas, error = await outcome(stream)
    assert len(deltas) == 1
    assert isinstance(error, AbortedError)


async def test_waiting_for_readiness_can_be_cancelled_without_aborting(house: House) -> None:
    engine = await house.engine(auto=False, script=say("a"))
    stream = await house.submit()
    waiting = asyncio.create_task(stream.wait_ready())
    await engine.saw(Submit)
    waiting.cancel()
    await asyncio.wait([waiting])
    engine.step()
    engine.step()
    assert text_of(await collect(stream)) == "a"


async def test_slow_reader_stops_the_engine_then_loses_its_request(house: House) -> None:
    house.reconfigure(stream_buffer_tokens=32, slow_reader_timeout_s=30.0)
    engine = await house.engine(script=lambda spec, c: byte_ids("z" * 500))
    stream = await house.submit(max_tokens=500)
    # Credit stops at the log's length when the buffer filled up, give or take the commit batching.
    await turns(lambda: engine.num_out(stream.request_id) >= 32)
    for _ in range(200):
        await asyncio.sleep(0)
    assert engine.num_out(stream.request_id) <= 32 + CREDIT_WINDOW
    house.clock.advance(29.0)
    house.front.check_times()
    assert not stream.ended
    house.clock.advance(2.0)
    house.front.check_times()
    deltas, error = await outcome(stream)
    assert isinstance(error, CapacityError)
    assert error.code == "slow_reader"
    assert deltas == []
    await engine.saw(Abort)


async def test_a_reader_that_catches_up_gets_everything(house: House) -> None:
    house.reconfigure(stream_buffer_tokens=32)
    engine = await house.engine(script=lambda spec, c: byte_ids("z" * 500))
    stream = await house.submit(max_tokens=500)
    await turns(lambda: engine.num_out(stream.request_id) >= 32)
    assert text_of(await collect(stream)) == "z" * 500


async def test_deadline_aborts_after_delivering_what_there_is(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit(deadline_ms=1500.0)
    await engine.saw(Submit)
    engine.step()
    await stream.wait_ready()
    house.clock.advance(1.4)
    house.front.check_times()
    assert not stream.ended
    house.clock.advance(0.2)
    house.front.check_times()
    deltas, error = await outcome(stream)
    assert len(deltas) == 1
    assert isinstance(error, DeadlineError)
    await engine.saw(Abort)


async def test_deadline_needs_nobody_to_look(house: House) -> None:
    await house.engine(auto=False)
    stream = await house.submit(deadline_ms=5.0)
    house.clock.advance(1.0)
    _, error = await outcome(stream)
    assert isinstance(error, DeadlineError)


async def test_admission_is_bounded_by_requests(house: House) -> None:
    house.reconfigure(max_num_inflight_reqs=2)
    await house.engine(auto=False)
    first = await house.submit()
    await house.submit()
    with pytest.raises(CapacityError) as refused:
        await house.submit()
    assert refused.value.retry_after_s
    await first.aclose()
    await house.submit()
    assert house.front.snapshot().num_refused == 1


async def test_admission_is_bounded_by_prompt_tokens_but_one_request_always_fits(house: House) -> None:
    house.reconfigure(max_num_inflight_tokens=4)
    await house.engine(auto=False)
    await house.submit("hello")
    with pytest.raises(CapacityError):
        await house.submit("h")


async def test_full_instances_refuse(house: House) -> None:
    await house.engine(auto=False, max_reqs=1)
    await house.submit()
    with pytest.raises(CapacityError):
        await house.submit()


async def test_requests_go_round_and_pass_over_the_full(house: House) -> None:
    one, two = [await house.engine(auto=False, max_reqs=2) for _ in range(2)]
    for _ in range(4):
        await house.submit()
    assert len(await one.saw(Submit, 2)) == len(await two.saw(Submit, 2)) == 2


async def test_two_models_on_one_front(house: House) -> None:
    await house.engine(model="cat", script=say("miau"))
    await house.engine(model="dog", script=say("wuff"))
    assert [c.model_id for c in house.front.models()] == ["cat", "dog"]
    cat, dog = await house.submit(model="cat"), await house.submit(model="dog")
    assert (text_of(await collect(cat)), text_of(await collect(dog))) == ("miau", "wuff")
    assert house.front.text("cat") is house.front.text("dog")
    with pytest.raises(NotFoundError) as unknown:
        await house.submit(model="../../etc/passwd")
    assert unknown.value.code == "model_not_found"


async def test_bad_requests_never_reach_the_engine(house: House) -> None:
    engine = await house.engine(auto=False)
    with pytest.raises(RequestError):
        await house.submit(temperature=-1.0)
    with pytest.raises(RequestError) as too_long:
        await house.submit("x" * 1024)
    assert too_long.value.code == "context_length_exceeded"
    await house.submit()
    assert len(await engine.saw(Submit)) == 1


async def test_engine_death_without_another_ends_its_requests_and_spares_the_others(house: House) -> None:
    house.reconfigure(recovery_grace_s=5.0)
    doomed = await house.engine(model="cat", auto=False)
    await house.engine(model="dog", script=say("wuff"))
    cat, dog = await house.submit(model="cat"), await house.submit(model="dog")
    await doomed.saw(Submit)
    doomed.step()
    await cat.wait_ready()
    doomed.crash()
    await turns(lambda: house.front.snapshot().num_waiting == 1)
    house.clock.advance(4.9)
    house.front.check_times()
    assert not cat.ended
    house.clock.advance(0.2)
    house.front.check_times()
    deltas, error = await outcome(cat)
    assert len(deltas) == 1
    assert isinstance(error, UnavailableError)
    assert error.code == "no_healthy_instance"
    assert error.retry_after_s
    assert text_of(await collect(dog)) == "wuff"
    assert house.front.ready() == (False, "engine_lost")
    with pytest.raises(UnavailableError):
        await house.submit(model="cat")


async def test_garbage_from_an_engine_counts_as_its_death(house: House) -> None:
    house.reconfigure(recovery_grace_s=0.0)
    engine = await house.engine(auto=False)
    stream = await house.submit()
    await engine.saw(Submit)
    engine.send_garbage()
    await turns(lambda: house.front.snapshot().num_waiting == 1)
    house.front.check_times()
    _, error = await outcome(stream)
    assert isinstance(error, UnavailableError)


async def test_an_engine_error_ends_its_request_only(house: House) -> None:
    engine = await house.engine(auto=False)
    bad, good = await house.submit(), await house.submit(max_tokens=1)
    await engine.saw(Submit, 2)
    info = ErrorInfo(kind="CapacityError", code="queue_full", message="full", retry_after_s=2.0)
    engine.say(Frame(request_id=bad.request_id, finish_reason=FinishReason.ERROR, error=info, last=True))
    engine.step()
    _, error = await outcome(bad)
    assert isinstance(error, CapacityError)
    assert error.retry_after_s == 2.0
    assert finishes(await collect(good)) == {0: ("length", None)}


async def test_drain_waits_for_what_runs_and_refuses_the_rest(house: House) -> None:
    engine = await house.engine(auto=False, script=say("a"))
    stream = await house.submit()
    await engine.saw(Submit)
    drained = asyncio.create_task(house.front.drain(60.0))
    await turns(lambda: house.front.snapshot().draining)
    with pytest.raises(UnavailableError) as refused:
        await house.submit()
    assert refused.value.code == "draining"
    assert house.front.ready() == (False, "draining")
    engine.step()
    engine.step()
    assert text_of(await collect(stream)) == "a"
    assert await drained


async def test_drain_cuts_off_what_takes_too_long(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit()
    assert not await house.front.drain(0.0)
    _, error = await outcome(stream)
    assert isinstance(error, UnavailableError)
    await engine.saw(Abort)


async def test_a_front_without_engines_is_not_ready(house: House) -> None:
    assert house.front.ready() == (False, "loading")
    await house.engine()
    assert house.front.ready() == (True, "ready")


async def test_a_model_is_found_by_its_aliases_but_an_id_beats_another_models_alias(house: House) -> None:
    cat = msgspec.structs.replace(sample_card(ASSETS, model_id="cat"), aliases=("dog", "pet"))
    house.engines += [SampleEngine(cat, ASSETS, script=say("miau"))]
    await house.front.add_instance(house.engines[0].stream, cat, name="a")
    await house.engine(model="dog", script=say("wuff"))
    streams = [await house.submit(model=name) for name in ("cat", "pet", "dog")]
    assert [text_of(await collect(s)) for s in streams] == ["miau", "miau", "wuff"]


async def test_text_that_was_prepared_is_not_fetched_again(house: House) -> None:
    house.front.prepare_text(dict(ASSETS))
    engine = SampleEngine(sample_card(ASSETS), {})
    house.engines.append(engine)
    await house.front.add_instance(engine.stream, engine.card, name="engine-0")
    assert house.front.text("sample").tokenizer.num_tokens == 512


async def test_prepared_text_that_does_not_fit_the_card_is_not_used(house: House) -> None:
    house.front.prepare_text({**ASSETS, "text_config": b'{"bos_token_id": 77}'})
    await house.engine()
    assert house.front.text("sample").tokenizer.bos_token_id != 77


async def test_unusable_prepared_text_refuses_the_instance_that_has_it(house: House) -> None:
    bad = {"tokenizer": b"{}"}
    house.front.prepare_text(bad)
    engine = SampleEngine(sample_card(bad), bad)
    house.engines.append(engine)
    with pytest.raises(ConfigError, match="tokenizer"):
        await house.front.add_instance(engine.stream, engine.card, name="engine-0")


async def test_an_engine_without_its_text_assets_is_refused_and_closed(house: House) -> None:
    card = msgspec.structs.replace(sample_card(ASSETS), assets={"tokenizer": "unknown"})
    house.engines.append(SampleEngine(sample_card(ASSETS), ASSETS))
    with pytest.raises(UnavailableError):
        await house.front.add_instance(house.engines[0].stream, card, name="a")
    assert house.front.models() == []
    with pytest.raises(ConnectionError):
        await house.engines[0].stream.send(Drain())


async def test_a_frame_of_another_attempt_may_name_any_choice(house: House) -> None:
    engine = await house.engine(auto=False)
    stream = await house.submit(max_tokens=1)
    await engine.saw(Submit)
    for choice in (-7, 99):
        engine.say(Frame(request_id=stream.request_id, attempt=3, choice=choice, tokens=byte_ids("x")))
    engine.step()
    deltas, _ = await outcome(stream)
    assert text_of(deltas) == "h"
    assert stream.error is None


async def test_an_instance_cannot_speak_for_a_request_of_another(house: House) -> None:
    one, two = [await house.engine(auto=False) for _ in range(2)]
    stream = await house.submit()
    await one.saw(Submit)
    two.say(Frame(request_id=stream.request_id, tokens=byte_ids("evil")))
    two.say(Frame(request_id=stream.request_id, finish_reason=FinishReason.STOP, last=True))
    other = await house.submit(max_tokens=1)
    await two.saw(Submit)
    two.step()
    await collect(other)
    assert stream.usage().completion_tokens == 0
    assert not stream.ended


async def test_the_observer_hears_of_output_and_of_one_end(house: House) -> None:
    heard: list[object] = []

    class Observer(NullObserver):
        def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
            heard.append((model, len(delta.token_ids), gap_s, first))

        def on_ended(self, record: RequestRecord) -> None:
            heard.append(record)

    house.front = Front(FrontConfig(), None, house.clock, observer=Observer())
    engine = await house.engine(auto=False, script=say("a"))
    stream = await house.submit()
    await engine.saw(Submit)
    for num_deltas in (1, 2):
        house.clock.advance(0.5)
        engine.step()
        await turns(lambda: len(heard) >= num_deltas)  # noqa: B023  awaited at once
    await collect(stream)
    record = heard[-1]
    assert isinstance(record, RequestRecord)
    assert heard[:2] == [("sample", 1, 0.5, True), ("sample", 1, 0.5, False)]
    assert (record.outcome, record.ttft_s, record.e2e_s) == ("stop", 0.5, 1.0)
    assert len(heard) == 3


async def test_a_router_that_names_a_stranger_is_a_bug_of_one_request(house: House) -> None:
    house.front = Front(FrontConfig(), lambda *_: Placement(instance="nobody", reasons=()), house.clock)
    await house.engine()
    with pytest.raises(InternalError):
        await house.submit()
    assert house.front.ready() == (True, "ready")
