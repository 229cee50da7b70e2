"""The engine ends requests that are out of time by its own clock, wherever they are."""

from __future__ import annotations

import pytest

from xllm.config import SchedulerConfig
from xllm.engine.scheduler.deadlines import SLACK
from xllm.testing.null_engine import NullEngine, null_engine, spec
from xllm.wire.messages import Frame

PROMPT = tuple(range(10, 200))


def late(frames: list[Frame]) -> list[str]:
    """Ids that ended with the deadline's error, checked to be their only terminal event."""
    last = [f for f in frames if f.last]
    assert len({f.request_id for f in last}) == len(last)
    return [f.request_id for f in last if f.error is not None and f.error.code == "deadline_exceeded"]


def engine_of() -> NullEngine:
    return null_engine(config=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64))


@pytest.mark.parametrize("steps_before", [0, 1, 2, 5, 20], ids=lambda n: f"{n} steps")
def test_it_ends_at_its_deadline_in_prefill_and_in_decode(steps_before: int) -> None:
    engine = engine_of()
    engine.core.submit(spec("a", PROMPT, max_tokens=100, ignore_eos=True, deadline_ms=500.0))
    frames = [f for _ in range(steps_before) for f in engine.step()]
    engine.clock.advance(0.499)
    frames += engine.step()
    assert late(frames) == []
    engine.clock.advance(0.002)
    frames += engine.step()
    assert late(frames) == ["a"]
    assert not engine.core.has_requests
    engine.memory.check_idle()


def test_a_waiting_request_is_dropped_uncomputed_and_others_go_on() -> None:
    engine = engine_of()
    for name in ("a", "b"):
        engine.core.submit(spec(name, (1, 2, 3), max_tokens=60, ignore_eos=True))
    engine.core.submit(spec("queued", PROMPT, max_tokens=5, deadline_ms=100.0))
    engine.core.submit(spec("patient", PROMPT, max_tokens=5, deadline_ms=1e6))
    frames = engine.step()
    computed = engine.core.snapshot().prompt_tokens
    engine.clock.advance(0.2)
    frames += engine.step()
    assert late(frames) == ["queued"]
    assert engine.core.snapshot().prompt_tokens == computed
    frames = engine.run()
    assert {f.request_id for f in frames if f.last and f.error is None} == {"a", "b", "patient"}
    engine.memory.check_idle()


def test_one_that_waits_for_credit_is_ended_too() -> None:
    engine = engine_of()
    engine.core.submit(spec("a", (1, 2, 3), max_tokens=60, ignore_eos=True, deadline_ms=100.0))
    while engine.core.step()[0]:
        continue  # nothing is committed, so it runs out of credit
    assert engine.core.has_requests
    engine.clock.advance(1.0)
    ran, frames = engine.core.step()
    assert not ran
    assert late(list(frames)) == ["a"]
    engine.memory.check_idle()


def test_an_ended_request_is_not_ended_again_and_its_id_may_come_back() -> None:
    engine = engine_of()
    engine.core.submit(spec("a", (1, 2, 3), max_tokens=1, deadline_ms=100.0))
    engine.run()
    engine.core.submit(spec("a", (1, 2, 3), max_tokens=60, ignore_eos=True, deadline_ms=10_000.0))
    engine.clock.advance(5.0)
    frames = engine.step()
    assert frames
    assert late(frames) == []
    assert [f.request_id for f in engine.run() if f.last and f.error is None] == ["a"]


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    engine = engine_of()
    for n in range(5 * SLACK):
        engine.core.submit(spec(f"r{n}", (1, 2, 3), max_tokens=1, deadline_ms=1e8))
        engine.run()
    assert len(engine.core.scheduler._deadlines._heap) <= SLACK + 4
