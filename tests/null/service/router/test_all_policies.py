"""What every policy keeps: it answers with an instance that has room, says why, and survives any picture."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.null.service.router.tables import COST, SLO, ask, chosen, instance, request
from xllm.service.router.base import InstanceView, RequestView, RouterPolicy
from xllm.service.router.registry import load_policy

NAMES = ("round-robin", "least-load", "cache-aware", "slo-aware")
LOAD_AWARE = NAMES[1:]


def anything(rng: random.Random, name: str) -> InstanceView:
    pages = rng.choice([0, 500])
    return instance(
        name,
        reqs=rng.choice([0, 1, 5, 10, 400]),
        max_reqs=rng.choice([None, 0, 6, 320]),
        backlog=rng.choice([0, 100, 100_000]),
        mine=rng.choice([0, 100, 100_000]),
        decoding=rng.choice([0, 1, 60, 2000]),
        context=rng.choice([0, 5000]),
        cost=rng.choice([(), COST, (0.0,) * 5, (float("nan"),) * 5, (1.0,)]),
        matched=rng.choice([(), (("device", 640),), (("dram", 64), ("expected", 9999)), (("hologram", 64),)]),
        recent=rng.choice([0.0, 50.0, 1e6]),
        num_pages=pages,
        free_pages=rng.choice([0, pages]),
        error=rng.choice([0.0, 0.3, 7.0]),
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_whatever_the_picture_the_answer_is_an_instance_with_room_or_none_has_any(
    name: str, seed: int
) -> None:
    rng = random.Random(seed)
    instances = [anything(rng, f"i{n}") for n in range(rng.randint(1, 6))]
    view = RequestView(
        request_id=f"r{seed}",
        model="m",
        num_prompt_tokens=rng.choice([1, 64, 3000]),
        num_choices=rng.choice([1, 4]),
        max_tokens=rng.choice([1, 100_000]),
        cls=rng.choice(["online", "offline"]),
        slo=rng.choice([SLO(), SLO(ttft_ms=1.0, tpot_ms=1.0, ttlt_ms=1.0)]),
        attempt=rng.choice([0, 3]),
        num_emitted=rng.choice([0, 200]),
    )
    placement = ask(load_policy(name), view, *instances)
    roomy = {i.name for i in instances if i.has_room}
    if not roomy:
        assert placement is None
        return
    assert placement is not None
    assert placement.instance in roomy
    assert placement.reasons
    if name != "round-robin":
        assert {n for n, _ in placement.scores} <= roomy
        assert placement.instance in dict(placement.scores)
        assert placement.ttft_ms is not None
        assert placement.work_ms >= 0.0
    assert ask(load_policy(name), view, *instances) == placement


@pytest.mark.parametrize("name", LOAD_AWARE)
def test_idle_equals_are_shared_out_by_the_name_of_the_request(name: str) -> None:
    """Two fronts with one picture would otherwise send every burst to the first instance."""
    idle = [instance(n) for n in "abcd"]
    policy = load_policy(name)
    counts = Counter(chosen(policy, request(name=f"cmpl-{i}"), *idle) for i in range(400))
    assert sorted(n or "" for n in counts) == ["a", "b", "c", "d"]
    assert max(counts.values()) < 160


@pytest.mark.parametrize("name", LOAD_AWARE)
def test_a_cold_start_without_any_metrics_is_served(name: str) -> None:
    placement = ask(load_policy(name), request(), instance("a", cost=()), instance("b", cost=()))
    assert placement is not None
    assert "cost=nominal" in placement.reasons


@pytest.mark.parametrize("name", LOAD_AWARE)
def test_without_costs_counts_and_tokens_decide(name: str) -> None:
    policy = load_policy(name)
    busy = instance("a", cost=(), reqs=8, decoding=8, context=8000)
    assert chosen(policy, request(), busy, instance("b", cost=(), reqs=1)) == "b"
    assert chosen(policy, request(), instance("a", cost=(), mine=5000), instance("b", cost=())) == "b"


@pytest.mark.parametrize("name", LOAD_AWARE)
def test_one_whose_cost_is_not_known_is_taken_to_be_like_the_others(name: str) -> None:
    slow = tuple(10 * c for c in COST)
    policy: RouterPolicy = load_policy(name)
    new, old = instance("new", cost=()), instance("old", cost=slow, backlog=2000)
    assert chosen(policy, request(), new, old) == "new"


def test_a_fit_that_is_often_wrong_is_not_believed_where_it_differs_from_its_peers() -> None:
    """One engine looks twice as fast. If its fit is good it is worth a queue; if not, it is not."""
    policy = load_policy("least-load")
    fast = tuple(c / 2 for c in COST)
    for error, is_believed in ((0.02, True), (0.3, False)):
        looks_fast = instance("fast", cost=fast, error=error, backlog=400)
        others = [instance(n, error=error, backlog=300) for n in "bcdef"]
        assert (chosen(policy, request(), looks_fast, *others) == "fast") is is_believed


def test_an_instance_is_not_asked_beyond_what_it_holds() -> None:
    for name in NAMES:
        full = instance("a", reqs=4, max_reqs=4, matched=(("device", 960),))
        far = instance("b", reqs=50, backlog=9000)
        assert chosen(load_policy(name), request(), full, far) == "b"
        assert chosen(load_policy(name), request(), full) is None
