"""Least load: a table of pairs of instances, and which one would answer sooner."""

from __future__ import annotations

import pytest

from tests.null.service.router.tables import COST, ask, chosen, instance, request
from xllm.service.router.base import InstanceView
from xllm.service.router.least_load import least_load

TWICE = tuple(2 * c for c in COST)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (instance("a", backlog=600), instance("b", backlog=100)),
        (instance("a", mine=600), instance("b", backlog=100)),
        (instance("a", decoding=12, context=6000), instance("b", decoding=2, context=1000)),
        (instance("a", decoding=2, context=200_000), instance("b", decoding=2, context=1000)),
        (instance("a", cost=TWICE), instance("b")),
        (instance("a", backlog=300, cost=TWICE), instance("b", backlog=400)),
        (instance("a", reqs=9), instance("b", reqs=1)),
    ],
    ids=[
        "backlog",
        "own backlog",
        "decoding",
        "contexts",
        "slow",
        "slow beats short",
        "requests on their way",
    ],
)
def test_the_sooner_answer_wins(worse: InstanceView, better: InstanceView) -> None:
    assert chosen(least_load, request(), worse, better) == "b"


def test_what_both_sides_count_is_not_counted_twice() -> None:
    """The engine has accepted the front's 500 tokens: they are one queue, not two."""
    both = instance("a", backlog=500, mine=500)
    assert chosen(least_load, request(), both, instance("b", backlog=700)) == "a"


def test_it_does_not_look_at_caches() -> None:
    cached = instance("a", backlog=200, matched=(("device", 960),))
    assert chosen(least_load, request(), cached, instance("b")) == "b"


def test_a_slow_instance_still_gets_its_share_when_the_fast_one_is_full_of_work() -> None:
    assert chosen(least_load, request(), instance("a", cost=TWICE), instance("b", backlog=4000)) == "a"


def test_the_prediction_is_the_arithmetic_of_the_cost_model() -> None:
    placement = ask(least_load, request(512), instance("a"))
    assert placement is not None
    assert placement.ttft_ms == pytest.approx(2.0 + 0.1 * 512 + 0.00005 * 512 * 513 / 2)
    assert placement.tpot_ms == pytest.approx(2.0 + 0.3 + 0.0002 * 512)
    assert any(reason.startswith("queue_ms=0.0") for reason in placement.reasons)
