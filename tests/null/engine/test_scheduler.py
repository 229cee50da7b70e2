"""What a step plans: budgets, catch-up, admission, order, credit."""

from __future__ import annotations

import pytest

from xllm.config import SchedulerConfig
from xllm.engine.plan import StepResult
from xllm.engine.scheduler.order import create_order
from xllm.errors import CapacityError, ConfigError, RequestError
from xllm.testing.null_engine import FULL, WINDOW, null_engine, outputs, spec
from xllm.types import FinishReason
from xllm.wire.messages import CREDIT_WINDOW

PROMPT = tuple(range(10, 210))


def plan_of(engine):
    """The next step, without running it."""
    plan = engine.core.scheduler.plan(0.0)
    if plan is not None:
        engine.core.scheduler.absorb(plan, StepResult(step=plan.step, sequences=(), dropped=True))
    return plan


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    engine = null_engine(config=SchedulerConfig(max_num_batched_tokens=64))
    engine.core.submit(spec("a", PROMPT, max_tokens=2))
    rows = []
    while engine.core.has_requests:
        plan = engine.core.scheduler.plan(0.0)
        rows.append(plan.num_rows)
        engine.core.scheduler.absorb(plan, engine.runner.execute(plan))
        engine.core.scheduler.committed("a", 0, 100)
    assert rows == [64, 64, 64, 8, 1]


def test_without_chunking_a_prompt_is_one_piece() -> None:
    config = SchedulerConfig(max_num_batched_tokens=64, enable_chunked_prefill=False)
    engine = null_engine(config=config)
    engine.core.submit(spec("a", PROMPT, max_tokens=1))
    assert plan_of(engine).num_rows == 200


def test_running_streams_go_before_a_long_prompt() -> None:
    engine = null_engine(config=SchedulerConfig(max_num_batched_tokens=64))
    engine.core.submit(spec("short", (1, 2, 3), max_tokens=50, ignore_eos=True))
    engine.step()
    engine.core.submit(spec("long", PROMPT, max_tokens=1))
    plan = plan_of(engine)
    assert [len(s.tokens) for s in plan.sequences] == [1, 63]


def test_a_plan_goes_by_rank_whatever_the_order_of_admission_and_preemption() -> None:
    engine = null_engine(config=SchedulerConfig(scheduling_policy="priority", max_num_batched_tokens=64))
    for name, priority in (("c", 3), ("a", 1), ("d", 3), ("b", 2)):
        engine.core.submit(spec(name, (1, 2, 3), max_tokens=50, priority=priority, ignore_eos=True))
        engine.step()

    def order() -> list[str]:
        origins = [engine.core.scheduler.origin_of(s.seq_id) for s in plan_of(engine).sequences]
        return [request_id for request_id, _ in filter(None, origins)]

    assert order() == ["a", "b", "c", "d"]
    assert engine.core.scheduler.preempt_all() == 4
    assert order() == ["a", "b", "c", "d"]


def test_chunk_borders_do_not_change_tokens() -> None:
    results = []
    for budget in (16, 64, 512):
        engine = null_engine(groups=(FULL, WINDOW), config=SchedulerConfig(max_num_batched_tokens=budget))
        engine.core.submit(spec("a", PROMPT, max_tokens=100, n=2, temperature=1.0))
        results.append(outputs(engine.run()))
    assert results[0] == results[1] == results[2]


def test_a_second_equal_prompt_reads_the_cache() -> None:
    engine = null_engine()
    engine.core.submit(spec("a", PROMPT, max_tokens=3))
    first = outputs(engine.run())
    engine.core.submit(spec("b", PROMPT, max_tokens=3))
    frames = engine.run()
    assert outputs(frames)["b", 0] == first["a", 0]
    assert {f.num_cached_tokens for f in frames} == {192}
    assert engine.core.snapshot().prefix_hits == 192


@pytest.mark.parametrize(
    "difference", [{"cache_salt": "x"}, {"skip_reading_prefix_cache": True}, {"prompt_logprobs": 0}]
)
def test_the_cache_is_not_read_across_salts_or_when_told_not_to(difference: dict) -> None:
    engine = null_engine()
    engine.core.submit(spec("a", PROMPT, max_tokens=1))
    engine.run()
    engine.core.submit(spec("b", PROMPT, max_tokens=1, **difference))
    assert engine.run()[0].num_cached_tokens == 0


def test_prompt_logprobs_cover_every_prompt_token_after_the_first() -> None:
    engine = null_engine(config=SchedulerConfig(max_num_batched_tokens=64))
    engine.core.submit(spec("a", PROMPT, max_tokens=2, prompt_logprobs=2))
    frames = engine.run()
    assert [len(f.prompt_logprobs) for f in frames] == [199, 0]
    assert [entry.token.token_id for entry in frames[0].prompt_logprobs] == list(PROMPT[1:])


def test_a_sequence_ahead_of_its_log_waits_until_the_front_commits() -> None:
    engine = null_engine()
    engine.core.submit(spec("a", PROMPT, max_tokens=100, ignore_eos=True))
    produced = []
    for _ in range(CREDIT_WINDOW + 5):
        produced += engine.core.step()[1]
    assert sum(len(f.tokens) for f in produced) == CREDIT_WINDOW
    assert plan_of(engine) is None
    engine.core.scheduler.committed("a", 0, 4)
    for _ in range(10):
        produced += engine.core.step()[1]
    assert sum(len(f.tokens) for f in produced) == CREDIT_WINDOW + 4


def test_min_tokens_bans_every_way_to_stop() -> None:
    engine = null_engine()
    engine.core.submit(
        spec("a", PROMPT, max_tokens=60, min_tokens=60, temperature=1.0, stop_token_ids=(5, 6))
    )
    tokens = outputs(engine.run())["a", 0]
    assert len(tokens) == 60
    assert not {2, 5, 6} & set(tokens)


def test_a_stop_id_ends_the_sequence_and_is_named() -> None:
    engine = null_engine()
    engine.core.submit(spec("a", PROMPT, max_tokens=20, ignore_eos=True))
    third = outputs(engine.run())["a", 0][2]
    engine.core.submit(spec("b", PROMPT, max_tokens=20, ignore_eos=True, stop_token_ids=(third,)))
    frames = engine.run()
    assert frames[-1].finish_reason is FinishReason.STOP
    assert frames[-1].stop_token_id == third
    assert outputs(frames)["b", 0][-1] == third


def test_more_requests_than_the_queue_holds_are_refused_without_a_trace() -> None:
    engine = null_engine(config=SchedulerConfig(max_num_seqs=1, max_num_queued_reqs=1))
    engine.core.submit(spec("a", PROMPT))
    engine.core.submit(spec("b", PROMPT))
    with pytest.raises(CapacityError):
        engine.core.submit(spec("c", PROMPT))
    assert engine.core.snapshot().num_accepted == 2
    with pytest.raises(RequestError, match="in use"):
        engine.core.submit(spec("a", PROMPT))


def test_a_request_that_could_never_fit_is_refused_at_once() -> None:
    engine = null_engine(num_pages=4)
    with pytest.raises(RequestError, match="KV memory"):
        engine.core.submit(spec("a", PROMPT, max_tokens=100))
    engine.core.submit(spec("b", PROMPT, max_tokens=50))
    assert len(outputs(engine.run())["b", 0]) == 50


def test_a_more_urgent_request_takes_the_seat_of_a_less_urgent_one() -> None:
    config = SchedulerConfig(max_num_seqs=1, scheduling_policy="priority")
    engine = null_engine(config=config)
    engine.core.submit(spec("batch", PROMPT, max_tokens=30, priority=5, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.core.submit(spec("chat", PROMPT[:50], max_tokens=2, priority=0, ignore_eos=True))
    frames = engine.run()
    ends = [f.request_id for f in frames if f.last]
    assert ends == ["chat", "batch"]
    assert engine.core.snapshot().num_preemptions == 1


def test_a_step_that_raises_fails_only_the_culprit() -> None:
    engine = null_engine()
    for name in ("good", "bad", "fine"):
        engine.core.submit(spec(name, PROMPT, max_tokens=5))
    culprit = plan_of(engine).sequences[1].seq_id
    engine.core.scheduler.preempt_all()

    def fault(entry) -> None:
        if entry.seq_id == culprit:
            raise ValueError("injected")

    engine.runner.fault = fault
    frames = engine.run()
    errors = {f.request_id: f.error for f in frames if f.last}
    assert errors["good"] is None
    assert errors["fine"] is None
    assert errors["bad"] is not None
    assert "injected" not in errors["bad"].message


def test_an_unknown_order_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fcfs, priority"):
        create_order("fastest")


def test_choices_without_credit_never_keep_a_sibling_from_running() -> None:
    """The front stopped two of three choices at a stop string: no more credit for them, and both seats."""
    engine = null_engine(config=SchedulerConfig(max_num_seqs=2))
    engine.core.submit(spec("a", (1, 2, 3), n=3, max_tokens=60, ignore_eos=True))
    drawn = 0
    for _ in range(200):
        _, frames = engine.core.step()
        for frame in frames:
            if frame.choice == 2:
                drawn += len(frame.tokens)
                engine.core.scheduler.committed("a", 2, drawn)
    assert drawn == 60


def test_a_reader_that_stands_still_keeps_neither_seats_nor_pages_from_others() -> None:
    engine = null_engine(num_pages=4, config=SchedulerConfig(max_num_seqs=1))
    engine.core.submit(spec("slow", PROMPT[:130], max_tokens=60, ignore_eos=True))
    for _ in range(CREDIT_WINDOW + 5):
        engine.core.step()
    engine.core.submit(spec("other", PROMPT[:150], max_tokens=2, cache_salt="x", ignore_eos=True))
    frames = [frame for _ in range(20) for frame in engine.core.step()[1]]
    assert {f.request_id for f in frames if f.last} == {"other"}
    engine.core.scheduler.committed("slow", 0, 1000)
    engine.run()
