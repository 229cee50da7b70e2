"""Blame, the queue of those who wait, and the price of a move: tables of cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cost import TransferCost
from xllm.service.failover.blame import Blame, DeathCause, known_cause
from xllm.service.failover.decision import move_cost
from xllm.service.failover.resume import ResumeQueue, retry_delay_s

# -- blame ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deaths", "convicted"),
    [
        ([("crash", 0)], False),
        ([("crash", 0), ("crash", 0)], True),
        ([("hang", 5), ("crash", 5)], True),
        ([("crash", 0), ("crash", 1)], False),
        ([("crash", 3), ("killed", 3)], False),
        ([("crash", 3), ("unknown", 3), ("unknown", 3)], True),
        ([("killed", 0)] * 15, False),
        ([("stopped", 0)] * 15, False),
        ([("unknown", 2)] * 3, False),
        ([("unknown", 2)] * 4, True),
        ([("killed", 0)] * 16, True),
        ([*[("killed", 0)] * 7, ("hang", 0), ("killed", 0)], True),
        ([("crash", 0), ("crash", 4), ("crash", 4)], True),
        ([("killed", i) for i in range(100)], False),
        ([("crash", i) for i in range(100)], False),
    ],
)
def test_only_deaths_without_progress_between_them_add_up(
    deaths: list[tuple[DeathCause, int]], convicted: bool
) -> None:
    blame = Blame()
    verdicts = [blame.death("r", committed, cause, "a") for cause, committed in deaths]
    assert verdicts[-1] is convicted
    assert not any(verdicts[:-1])


def test_one_death_by_its_own_doing_puts_a_request_at_risk_until_it_gets_on() -> None:
    blame = Blame()
    assert not blame.at_risk("r", 0)
    blame.death("r", 3, "crash", "a")
    blame.death("other", 3, "killed", "a")
    assert blame.at_risk("r", 3)
    assert not blame.at_risk("r", 4)
    assert not blame.at_risk("other", 3)
    blame.forget("r")
    blame.forget("nobody")
    assert not blame.at_risk("r", 3)
    assert len(blame) == 1


def test_a_suspect_that_comes_back_charges_nobody() -> None:
    blame = Blame()
    blame.death("r", 3, "hang", "a")
    blame.death("s", 3, "crash", "b")
    blame.acquit("a")
    assert not blame.at_risk("r", 3)
    assert blame.at_risk("s", 3)
    assert len(blame) == 1
    assert not blame.death("r", 3, "hang", "a")
    assert blame.death("s", 3, "hang", "a")


def test_an_unknown_word_is_an_unknown_cause() -> None:
    assert known_cause("crash") == "crash"
    assert known_cause("meteor") == known_cause(None) == known_cause(7) == "unknown"


# -- the queue --------------------------------------------------------------------------------------


def test_the_oldest_goes_first_and_nobody_before_its_time() -> None:
    queue = ResumeQueue(8)
    for request_id, age in (("c", 3), ("a", 1), ("b", 2)):
        queue.wait(request_id, age)
    queue.wait("late", 0, not_before_s=5.0)
    assert queue.due(4.0) == ("a", "b", "c")
    assert queue.due(5.0) == ("late", "a", "b", "c")


def test_an_instance_catches_up_on_a_few_at_a_time() -> None:
    queue = ResumeQueue(2)
    for request_id in ("a", "b"):
        queue.wait(request_id, 0)
        assert queue.has_room("x", at_risk=False)
        queue.took_over(request_id, "x", at_risk=False)
    assert not queue.has_room("x", at_risk=False)
    assert queue.has_room("y", at_risk=False)
    assert queue.caught_up("a")
    assert not queue.caught_up("a")
    assert queue.has_room("x", at_risk=False)


def test_those_at_risk_are_tried_one_at_a_time_beside_others() -> None:
    queue = ResumeQueue(8)
    queue.took_over("fine", "x", at_risk=False)
    assert queue.has_room("x", at_risk=True)
    queue.took_over("risky", "x", at_risk=True)
    assert not queue.has_room("x", at_risk=True)
    assert queue.has_room("x", at_risk=False)
    assert queue.drop("risky")
    assert queue.has_room("x", at_risk=True)


def test_only_the_time_without_any_instance_counts_as_grace() -> None:
    queue = ResumeQueue(8)
    queue.wait("a", 0)
    assert queue.expired(1e9, 30.0) == ()
    queue.alone("a", 10.0, alone=True)
    queue.alone("a", 25.0, alone=True)
    assert queue.expired(39.9, 30.0) == ()
    assert queue.expired(40.0, 30.0) == ("a",)
    queue.alone("a", 41.0, alone=False)
    assert queue.expired(1e9, 30.0) == ()
    queue.alone("nobody", 1.0, alone=True)


def test_pauses_between_refusals_grow_and_stay_bounded() -> None:
    delays = [retry_delay_s(n) for n in range(30)]
    assert delays == sorted(delays)
    assert delays[0] == 0.0
    assert 0.0 < delays[-1] <= 1.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["wait", "take", "answer", "drop"]),
            st.sampled_from("abcde"),
            st.sampled_from("xyz"),
        )
    )
)
def test_a_request_waits_or_catches_up_never_both(moves: list[tuple[str, str, str]]) -> None:
    queue = ResumeQueue(2)
    waiting: set[str] = set()
    taken: dict[str, str] = {}
    for kind, request_id, instance in moves:
        if kind == "wait":
            queue.wait(request_id, 0)
            waiting.add(request_id)
            taken.pop(request_id, None)
        elif kind == "take" and request_id in waiting:
            queue.took_over(request_id, instance, at_risk=False)
            waiting.discard(request_id)
            taken[request_id] = instance
        elif kind == "answer":
            assert queue.caught_up(request_id) == (taken.pop(request_id, None) is not None)
        elif kind == "drop":
            queue.drop(request_id)
            waiting.discard(request_id)
            taken.pop(request_id, None)
        assert set(queue.due(0.0)) == waiting
        assert queue.num_catching_up == len(taken)
        for name in "xyz":
            assert queue.has_room(name, at_risk=False) == (list(taken.values()).count(name) < 2)


# -- the price of a move ----------------------------------------------------------------------------

COST = (1.0, 0.1, 0.0, 1.0, 0.0)


def test_a_prefix_that_the_target_has_is_not_recomputed() -> None:
    cold = move_cost(640, 0, COST, obstacle="source_gone")
    warm = move_cost(640, 576, COST, obstacle="source_gone")
    whole = move_cost(640, 640, COST, obstacle="source_gone")
    assert (cold.recompute_tokens, warm.recompute_tokens, whole.recompute_tokens) == (640, 64, 1)
    assert cold.recompute_ms == pytest.approx(65.0)
    assert warm.recompute_ms == pytest.approx(7.4)


def test_migration_is_priced_and_not_taken_while_there_is_no_transport() -> None:
    link = TransferCost(latency_ms=1.0, bytes_per_ms=1e6)
    cost = move_cost(640, 0, COST, obstacle="no_transport", page_bytes=1_000_000, link=link)
    assert cost.migrate_ms == pytest.approx(11.0)
    assert not cost.migrates
    assert "cheaper by 54.0 ms, no_transport" in str(cost)


@pytest.mark.parametrize(
    ("bytes_per_ms", "migrates", "told"),
    [
        (1e6, True, "migrate: 11.0 ms (recompute 640 tokens: 65.0 ms)"),
        (1e4, False, "recompute 640 tokens in 65.0 ms (migrate: 1001.0 ms)"),
    ],
)
def test_the_cheaper_branch_is_taken_and_both_numbers_are_told(
    bytes_per_ms: float, migrates: bool, told: str
) -> None:
    link = TransferCost(latency_ms=1.0, bytes_per_ms=bytes_per_ms)
    cost = move_cost(640, 0, COST, obstacle="", page_bytes=1_000_000, link=link)
    assert cost.migrates is migrates
    assert str(cost) == told


@pytest.mark.parametrize(("coefficients", "page_bytes"), [((), 1000), (COST, 0), ((), 0)])
def test_where_a_number_is_unknown_the_pages_are_taken_along(
    coefficients: tuple[float, ...], page_bytes: int
) -> None:
    assert move_cost(640, 0, coefficients, obstacle="", page_bytes=page_bytes).migrates
    assert not move_cost(640, 0, coefficients, obstacle="other_class", page_bytes=page_bytes).migrates


def test_from_a_dead_instance_nothing_can_be_migrated() -> None:
    cost = move_cost(640, 0, COST, obstacle="source_gone", page_bytes=1_000_000)
    assert cost.migrate_ms is None
    assert str(cost) == "recompute 640 tokens in 65.0 ms"


@pytest.mark.parametrize("coefficients", [(), (1.0,), (float("nan"),) * 5])
def test_without_a_known_cost_only_the_tokens_are_told(coefficients: tuple[float, ...]) -> None:
    cost = move_cost(10, 0, coefficients, obstacle="no_transport", page_bytes=5)
    assert cost.recompute_ms is None
    assert not cost.migrates
    assert str(cost) == "recompute 10 tokens (cost unknown)"
