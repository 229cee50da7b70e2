"""One request at the door: each limit at and beyond it, what is counted, what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from xllm.config import FrontConfig
from xllm.cost import StepCost
from xllm.errors import CapacityError
from xllm.service.admission import Admission, Ask
from xllm.service.admission.admission import MAX_RETRY_AFTER_S
from xllm.service.admission.lengths import FIRST_GUESS, OutputLengths
from xllm.service.admission.waits import MIN_SERVED, ServiceRate
from xllm.service.router.base import InstanceView
from xllm.types import EngineSnapshot


def ask(request_id: str, **fields: Any) -> Ask:
    given: dict[str, Any] = {"model": "m", "num_prompt_tokens": 10, "max_tokens": 10, **fields}
    return Ask(request_id=request_id, **given)


def view(name: str = "i", *, num_reqs: int = 0, **engine: Any) -> InstanceView:
    return InstanceView(name=name, num_reqs=num_reqs, max_reqs=None, engine=EngineSnapshot(**engine))


def refusal(admission: Admission, asked: Ask, *views: InstanceView, now_s: float = 0.0) -> str:
    """'ok', or the rule that spoke against it; a refused request must leave the counts alone."""
    rules = admission.num_refused.copy()
    counts = (admission.num_reqs, admission.num_tokens, admission.num_pages("m"))
    try:
        admission.admit(asked, views or (view(),), now_s)
    except CapacityError as error:
        refused = error
    else:
        return "ok"
    assert refused.retry_after_s is not None
    assert 1.0 <= refused.retry_after_s <= 1.5 * MAX_RETRY_AFTER_S
    assert (admission.num_reqs, admission.num_tokens, admission.num_pages("m")) == counts
    (rule,) = admission.num_refused - rules
    assert refused.code == ("slow_down" if rule in ("delay", "deadline") else "queue_full")
    return rule


def test_requests_are_bounded_and_make_room_when_they_end() -> None:
    admission = Admission(FrontConfig(max_num_inflight_reqs=2))
    assert [refusal(admission, ask(str(n))) for n in range(3)] == ["ok", "ok", "requests"]
    admission.ended("0", (), complete=False)
    assert refusal(admission, ask("3")) == "ok"


def test_prompt_tokens_are_bounded_but_one_large_request_alone_is_served() -> None:
    admission = Admission(FrontConfig(max_num_inflight_tokens=100))
    assert refusal(admission, ask("large", num_prompt_tokens=101)) == "ok"
    assert refusal(admission, ask("next", num_prompt_tokens=1)) == "tokens"
    admission.ended("large", (), complete=False)
    assert refusal(admission, ask("a", num_prompt_tokens=60)) == "ok"
    assert refusal(admission, ask("b", num_prompt_tokens=40)) == "ok"
    assert refusal(admission, ask("c", num_prompt_tokens=1)) == "tokens"


def test_predicted_pages_are_bounded_by_those_of_the_models_instances() -> None:
    admission = Admission(FrontConfig(max_kv_oversubscription=2.0))
    small = view("a", total_pages=3), view("b", total_pages=2)
    # One page of prompt, two choices of two pages: 5 of 2.0 × 5.
    five = {"num_prompt_tokens": 64, "max_tokens": 128, "num_choices": 2}
    assert [refusal(admission, ask(str(n), **five), *small) for n in range(3)] == ["ok", "ok", "pages"]
    assert refusal(admission, ask("less", num_prompt_tokens=1, max_tokens=1), *small) == "pages"
    assert refusal(admission, ask("more room", num_prompt_tokens=1), view(total_pages=6)) == "ok"
    assert refusal(admission, ask("unknown", **five), view(total_pages=0)) == "ok"


def test_a_request_larger_than_all_pages_is_served_alone() -> None:
    admission = Admission(FrontConfig(max_kv_oversubscription=1.0))
    tiny = view(total_pages=1)
    assert refusal(admission, ask("large", num_prompt_tokens=640), tiny) == "ok"
    assert refusal(admission, ask("next"), tiny) == "pages"


def test_pages_of_one_model_do_not_count_for_another() -> None:
    admission = Admission(FrontConfig(max_kv_oversubscription=1.0))
    assert refusal(admission, ask("0"), view(total_pages=2)) == "ok"
    assert refusal(admission, ask("1"), view(total_pages=2)) == "pages"
    assert refusal(admission, ask("2", model="other"), view(total_pages=2)) == "ok"


def test_short_answers_make_room_for_more_and_aborted_ones_tell_nothing() -> None:
    admission = Admission(FrontConfig(max_kv_oversubscription=1.0))
    room = view(total_pages=10)
    long = {"max_tokens": 10_000}
    # Nothing known: 1 + 4 pages each.
    assert [refusal(admission, ask(str(n), **long), room) for n in range(3)] == ["ok", "ok", "pages"]
    for n in range(2):
        admission.ended(str(n), (1,), complete=False)
    assert refusal(admission, ask("a", **long), room) == "ok"
    assert admission.num_pages("m") == 5
    for _ in range(20):
        admission.ended("a", (60,), complete=True)
        admission.admit(ask("a", **long), (room,), 0.0)
    assert admission.num_pages("m") == 2


# -- the predicted wait -------------------------------------------------------------------------


def queued(
    admission: Admission, num: int, *, started_s: float = 0.0, per_s: float = 4.0
) -> tuple[int, float]:
    """`num` requests wait at "i", which answers `per_s` of them a second; (answered, now)."""
    for n in range(num):
        admission.admit(ask(str(n), tenant="a"), (view(),), started_s)
        admission.placed(str(n), "i")
    num_answered = min(num - 1, 2 * MIN_SERVED)
    now_s = started_s
    admission.admit(ask("gate", tenant="a"), (full(num, 0),), now_s)
    for n in range(num_answered):
        now_s += 1 / per_s
        admission.answered(str(n), full(num - n - 1, n + 1).engine, now_s)
    admission.ended("gate", (), complete=False)
    return num_answered, now_s


def full(num_waiting: int, step: int = 0, num_running: int = 8) -> InstanceView:
    total = num_waiting + num_running
    return view(
        num_reqs=total, num_waiting=num_waiting, num_running=num_running, num_requests=total, step=step
    )


def test_the_wait_is_the_queue_over_the_measured_rate() -> None:
    admission = Admission(FrontConfig(max_queue_delay_s=5.0))
    answered, now_s = queued(admission, 50, per_s=4.0)
    left = 50 - answered
    assert admission.wait_s((full(left, answered),), now_s) == pytest.approx(left / 4.0, rel=0.1)
    assert admission.wait_s((full(100, answered),), now_s) == pytest.approx(25.0, rel=0.1)


@pytest.mark.parametrize(("num_waiting", "rule"), [(18, "ok"), (23, "delay")])
def test_beyond_the_delay_limit_is_refused_when_nothing_is_idle(num_waiting: int, rule: str) -> None:
    admission = Admission(FrontConfig(max_queue_delay_s=5.0))
    answered, now_s = queued(admission, 40, per_s=4.0)
    busy = full(num_waiting, answered)
    assert refusal(admission, ask("new", tenant="a"), busy, now_s=now_s) == rule
    assert refusal(admission, ask("other", tenant="a"), busy, view("idle"), now_s=now_s) == "ok"
    assert refusal(admission, ask("slow", tenant="a", cls="offline"), busy, now_s=now_s) == "ok"


def test_a_free_slot_is_idle_however_slow_the_instance_was_before() -> None:
    admission = Admission(FrontConfig(max_queue_delay_s=5.0))
    answered, now_s = queued(admission, 40, per_s=0.1)
    assert refusal(admission, ask("queued", tenant="a"), full(8, answered), now_s=now_s) == "delay"
    free = view(num_reqs=7, num_running=7, num_requests=7, step=answered)
    assert refusal(admission, ask("free", tenant="a"), free, now_s=now_s) == "ok"


def test_retry_after_is_the_drain_time_spread_by_at_most_half() -> None:
    admission = Admission(FrontConfig(max_queue_delay_s=5.0))
    answered, now_s = queued(admission, 40, per_s=4.0)
    after = set()
    for n in range(50):
        with pytest.raises(CapacityError) as caught:
            admission.admit(ask(f"r{n}", tenant="a"), (full(40, answered),), now_s)
        after.add(caught.value.retry_after_s)
    assert len(after) > 40
    assert 9.0 < min(a for a in after if a) < 11.0
    assert 13.0 < max(a for a in after if a) <= 16.0


def test_zero_turns_the_rule_off_and_a_deadline_keeps_its_own() -> None:
    admission = Admission(FrontConfig(max_queue_delay_s=0.0))
    answered, now_s = queued(admission, 40, per_s=4.0)
    busy = full(40, answered)
    assert refusal(admission, ask("any", tenant="a"), busy, now_s=now_s) == "ok"
    assert refusal(admission, ask("short", tenant="a", deadline_ms=5_000.0), busy, now_s=now_s) == "deadline"
    assert refusal(admission, ask("long", tenant="a", deadline_ms=60_000.0), busy, now_s=now_s) == "ok"


def test_a_cold_start_admits_by_counts_and_by_cost_where_an_instance_tells_one() -> None:
    admission = Admission(FrontConfig(max_queue_delay_s=5.0))
    assert refusal(admission, ask("0"), full(100)) == "ok"
    cost = StepCost((0.0, 10.0, 0.0, 0.0, 0.0)).coefficients

    def backlog(num_tokens: int, **engine: Any) -> InstanceView:
        return InstanceView(
            name="told",
            num_reqs=9,
            max_reqs=None,
            engine=EngineSnapshot(cost=cost, **engine),
            backlog_tokens=num_tokens,
        )

    assert refusal(admission, ask("1"), backlog(490)) == "ok"
    assert refusal(admission, ask("2"), backlog(510)) == "delay"
    assert refusal(admission, ask("3"), backlog(510, prefix_queries=100, prefix_hits=50)) == "ok"


def test_a_moved_request_waits_where_it_went_and_an_answered_one_nowhere() -> None:
    admission = Admission(FrontConfig())
    for request_id in ("a", "b"):
        admission.admit(ask(request_id), (view(),), 0.0)
        admission.placed(request_id, "i")
    admission.answered("b", EngineSnapshot(), 1.0)
    admission.placed("a", "j")
    admission.placed("b", "j")
    unanswered = {name: q.num_unanswered for name, q in admission._queues.items()}
    assert unanswered == {"i": 0, "j": 1}
    for request_id in ("a", "b"):
        admission.ended(request_id, (1,), complete=True)
    assert {q.num_unanswered for q in admission._queues.values()} == {0}
    assert (admission.num_reqs, admission.num_tokens, admission.num_pages("m")) == (0, 0, 0)


def test_names_of_instances_and_tenants_do_not_pile_up() -> None:
    admission = Admission(FrontConfig())
    for n in range(3000):
        admission.admit(ask(str(n), tenant=f"t{n}"), (view(f"i{n}"),), 0.0)
        admission.placed(str(n), f"i{n}")
        admission.ended(str(n), (1,), complete=True)
    assert len(admission._queues) <= 1024
    assert len(admission._lengths._groups) <= 512
    assert not admission._shares._held


# -- the parts ----------------------------------------------------------------------------------


def test_the_rate_runs_only_while_somebody_queues_and_falls_in_a_stall() -> None:
    rate = ServiceRate(horizon_s=1.0)
    for n in range(20):  # demand, not capacity: nobody waits
        rate.note(EngineSnapshot(step=n), 1, float(n))
    assert rate.per_s(20.0) is None
    rate.note(EngineSnapshot(step=20, num_waiting=5), 0, 20.0)
    for n in range(32):
        rate.note(EngineSnapshot(step=21 + n, num_waiting=5), 1, 20.0 + (n + 1) / 8)
    assert rate.per_s(24.0) == pytest.approx(8.0, rel=0.1)
    stalled = rate.per_s(28.0)
    assert stalled is not None
    assert stalled < 3.0
    rate.note(EngineSnapshot(step=60, num_waiting=0), 0, 28.0)
    assert rate.per_s(1000.0) == pytest.approx(stalled, rel=0.01)


def test_all_first_tokens_of_the_step_that_emptied_the_queue_count() -> None:
    rate = ServiceRate(horizon_s=1.0)
    rate.note(EngineSnapshot(step=1, num_waiting=20), 0, 0.0)
    for _ in range(20):
        rate.note(EngineSnapshot(step=2, num_waiting=0), 1, 2.0)
    assert rate.per_s(9.0) == pytest.approx(10.0)


def test_predicted_lengths_are_a_high_quantile_bounded_by_max_tokens() -> None:
    lengths = OutputLengths()
    assert lengths.predict("m", "t", 10_000) == FIRST_GUESS
    for n in range(1, 101):
        lengths.observe("m", "t", n)
    assert 78 <= lengths.predict("m", "t", 10_000) <= 82
    assert lengths.predict("m", "t", 50) == 50
    assert 78 <= lengths.predict("m", "stranger", 10_000) <= 82
    for _ in range(20):
        lengths.observe("m", "other", 1000)
    assert lengths.predict("m", "other", 10_000) == 1000
    assert 78 <= lengths.predict("m", "t", 10_000) <= 85
