"""Steps planned while one runs: the same frames and the same usage as one at a time, and tests that bite."""

from __future__ import annotations

import msgspec
import pytest

from xllm.config import SchedulerConfig
from xllm.engine.lateness import MARGIN_S, plan_at_s
from xllm.engine.plan import PENDING, StepPlan, StepResult
from xllm.engine.request import Sequence
from xllm.engine.scheduler import absorb, entries, flights
from xllm.testing.null_engine import EOS, FULL, WINDOW, NullEngine, null_engine, outputs, spec
from xllm.types import FinishReason
from xllm.wire.messages import CREDIT_WINDOW, Frame

PROMPT = tuple(range(10, 210))
USAGE = ("prompt_tokens", "generation_tokens", "num_accepted", "num_ended", "prefix_queries", "prefix_hits")


def engine_of(lookahead: bool, **more) -> NullEngine:
    return null_engine(groups=(FULL, WINDOW), lookahead=lookahead, **more)


def plans_of(engine: NullEngine) -> list[StepPlan]:
    """Every plan from now on, as it is handed over."""
    seen: list[StepPlan] = []
    submit = engine.core.steps._executor.submit

    def watched(plan: StepPlan) -> None:
        seen.append(plan)
        submit(plan)

    engine.core.steps._executor.submit = watched  # type: ignore[method-assign]
    return seen


def told(frames: list[Frame]) -> dict[tuple[str, int], list[object]]:
    """All a front learns, by choice, without what depends on the clock."""
    found: dict[tuple[str, int], list[object]] = {}
    for frame in frames:
        found.setdefault((frame.request_id, frame.choice), []).append(
            msgspec.structs.replace(frame, queue_ms=0.0, prefill_ms=0.0, last=False)
        )
    return found


CASES = {
    "length": {"max_tokens": 70, "ignore_eos": True},
    "eos": {"max_tokens": 400, "temperature": 1.0, "logit_bias": {EOS: 4.0}},
    "min_tokens": {"max_tokens": 400, "temperature": 1.0, "logit_bias": {EOS: 6.0}, "min_tokens": 20},
    "penalties": {"max_tokens": 60, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "choices": {"max_tokens": 50, "n": 3, "temperature": 1.0, "logit_bias": {EOS: 3.0}},
    "logprobs": {"max_tokens": 30, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True},
}


@pytest.mark.parametrize("case", CASES)
def test_frames_and_usage_are_those_of_one_step_at_a_time(case: str) -> None:
    seen = []
    for lookahead in (False, True):
        engine = engine_of(lookahead)
        plans = plans_of(engine)
        for number, length in enumerate((200, 150, 64)):
            engine.core.submit(spec(f"r{number}", PROMPT[:length], **CASES[case], cache_salt=str(number)))
        frames = engine.run()
        assert any(s.pending for plan in plans for s in plan.sequences) is lookahead
        snapshot = engine.core.snapshot()
        usage = {name: getattr(snapshot, name) for name in USAGE}
        seen.append((told(frames), usage, set(engine.core.page_names())))
        engine.memory.check_idle()
    assert seen[0] == seen[1]


def test_a_stop_id_is_found_one_step_late_and_nothing_of_that_step_shows() -> None:
    engine = engine_of(lookahead=True)
    engine.core.submit(spec("a", PROMPT, max_tokens=20, ignore_eos=True))
    tokens = outputs(engine.run())["a", 0]
    plans = plans_of(engine)
    fields = {"max_tokens": 20, "ignore_eos": True, "stop_token_ids": (tokens[5],)}
    engine.core.submit(spec("b", PROMPT, **fields))
    frames = engine.run()
    last = tokens.index(tokens[5])
    assert outputs(frames)["b", 0] == tokens[: last + 1]
    assert frames[-1].finish_reason is FinishReason.STOP
    assert len(plans) == last + 2, "one step in vain"
    assert engine.core.snapshot().generation_tokens == 20 + last + 1


def test_no_step_is_planned_behind_a_draw_that_is_surely_the_last() -> None:
    engine = engine_of(lookahead=True)
    plans = plans_of(engine)
    engine.core.submit(spec("a", PROMPT, max_tokens=5, ignore_eos=True))
    engine.run()
    assert len(plans) == 5
    assert [s.tokens[-1] == PENDING for plan in plans for s in plan.sequences] == [False] + [True] * 4


def test_credit_counts_tokens_that_are_being_drawn() -> None:
    engine = engine_of(lookahead=True)
    engine.core.submit(spec("a", PROMPT, max_tokens=100, ignore_eos=True))
    frames = [f for _ in range(CREDIT_WINDOW + 5) for f in engine.core.step()[1]]
    assert sum(len(f.tokens) for f in frames) == CREDIT_WINDOW
    assert engine.core.step() == (False, ())


def test_pages_of_an_aborted_request_stay_taken_until_its_step_is_over() -> None:
    engine = engine_of(lookahead=True, enable_prefix_caching=False)
    engine.core.submit(spec("a", PROMPT, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert engine.core.steps
    owned = engine.core.snapshot().owned_pages
    engine.core.abort("a")
    assert engine.core.snapshot().owned_pages == owned > 0
    assert engine.core.advance()
    assert engine.core.snapshot().owned_pages == 0


def test_a_seat_that_must_be_taken_from_somebody_is_taken_with_nothing_under_way() -> None:
    config = SchedulerConfig(max_num_seqs=1, scheduling_policy="priority")
    engine = engine_of(lookahead=True, config=config)
    engine.core.submit(spec("batch", PROMPT, max_tokens=30, priority=5, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.core.submit(spec("chat", PROMPT[:50], max_tokens=2, priority=0, ignore_eos=True))
    frames = engine.run()
    assert [f.request_id for f in frames if f.last] == ["chat", "batch"]
    assert sum(len(f.tokens) for f in frames if f.request_id == "batch") + 3 == 30
    assert engine.core.snapshot().num_preemptions == 1


def test_time_is_left_for_requests_that_arrive_while_a_step_runs() -> None:
    assert plan_at_s(10.0, 0.0) < 10.0, "nobody knows how long it takes: at once"
    assert plan_at_s(10.0, 1.0) < 10.0
    assert plan_at_s(10.0, 5.0) == pytest.approx(10.005 - MARGIN_S)
    assert plan_at_s(10.0, 100.0) == pytest.approx(10.085)


# -- faults that the tests must find -----------------------------------------------------------------


def copies_dropped() -> dict[tuple[str, int], tuple[int, ...]]:
    """The step behind one that fails copies a page for a choice that has just been forked."""
    engine = engine_of(lookahead=True)
    engine.core.submit(spec("steady", PROMPT[:70], max_tokens=20, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.core.submit(spec("forks", PROMPT[:100], max_tokens=20, n=2, temperature=1.0, ignore_eos=True))
    failures = [1]

    def fault(entry) -> None:
        origin = engine.core.scheduler.origin_of(entry.seq_id)
        behind = list(engine.core.scheduler.flights)[1:]
        if failures and origin == ("steady", 0) and any(flight.plan.copies for flight in behind):
            failures.pop()
            raise RuntimeError("injected")

    engine.runner.fault = fault
    frames = engine.run()
    assert not failures, "no step with copies was dropped"
    assert all(f.error is None for f in frames)
    return {key: tokens for key, tokens in outputs_of("forks", frames).items()}


def outputs_of(name: str, frames: list[Frame]) -> dict[tuple[str, int], tuple[int, ...]]:
    return outputs([f for f in frames if f.request_id == name])


def test_copies_of_a_dropped_step_are_made_with_the_next_one() -> None:
    engine = engine_of(lookahead=False)
    engine.core.submit(spec("forks", PROMPT[:100], max_tokens=20, n=2, temperature=1.0, ignore_eos=True))
    assert copies_dropped() == outputs(engine.run())


def test_dropped_copies_that_are_forgotten_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = absorb.Absorber.absorb

    def forgetful(self: absorb.Absorber, plan: StepPlan, result: StepResult) -> None:
        original(self, plan, result)
        if result.dropped:
            del self._books.copies[: len(plan.copies)]

    monkeypatch.setattr(absorb.Absorber, "absorb", forgetful)
    with pytest.raises(AssertionError):
        copies_dropped()


def test_pages_that_are_given_back_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = flights.Flights.leave

    def hasty(self: flights.Flights, seq: Sequence) -> None:
        if seq.table is not None:
            self._release(seq.table)
        leave(self, seq)

    monkeypatch.setattr(flights.Flights, "leave", hasty)
    with pytest.raises(AssertionError, match="belongs to nobody"):
        test_a_stop_id_is_found_one_step_late_and_nothing_of_that_step_shows()


def test_an_offset_that_forgets_the_pending_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = entries._sample_op

    def early(seq: Sequence, *more):
        op = original(seq, *more)
        return msgspec.structs.replace(op, offset=op.offset - seq.drawing)

    monkeypatch.setattr(entries, "_sample_op", early)
    with pytest.raises(AssertionError):
        test_frames_and_usage_are_those_of_one_step_at_a_time("eos")
