"""What the front remembers: work fades with new work, pages are expected until the answer."""

from __future__ import annotations

import random

import pytest

from xllm.service.router.memory import WINDOW_REQS, PlacementMemory

CHAIN = tuple(bytes([n]) * 16 for n in range(6))
AB = ("a", "b")


def test_a_burst_of_one_prefix_sees_the_pages_that_its_first_request_will_leave() -> None:
    memory = PlacementMemory()
    memory.placed("r1", "a", 10.0, AB, CHAIN[:4])
    assert memory.matched("a", CHAIN) == (("expected", 256),)
    assert memory.matched("b", CHAIN) == ()
    assert memory.matched("a", (CHAIN[5], *CHAIN)) == ()


def test_what_the_index_knows_is_not_expected_again() -> None:
    memory = PlacementMemory()
    memory.placed("r1", "a", 10.0, AB, CHAIN[:4])
    found = (("device", 2), ("dram", 1))
    assert memory.matched("a", CHAIN, found) == (("device", 128), ("dram", 64), ("expected", 64))
    assert memory.matched("b", CHAIN, found) == (("device", 128), ("dram", 64))


def test_the_answer_or_the_end_settles_it_once() -> None:
    memory = PlacementMemory()
    memory.placed("r1", "a", 10.0, AB, CHAIN[:4])
    memory.placed("r2", "a", 10.0, AB, CHAIN[:2])
    memory.settled("r1")
    memory.settled("r1")
    assert memory.matched("a", CHAIN) == (("expected", 128),)
    memory.settled("r2")
    memory.settled("unknown")
    assert memory.matched("a", CHAIN) == ()


def test_a_moved_request_is_expected_at_its_new_place_only() -> None:
    memory = PlacementMemory()
    memory.placed("r1", "a", 10.0, AB, CHAIN[:4])
    memory.placed("r1", "b", 10.0, AB, CHAIN[:4])
    assert memory.matched("a", CHAIN) == ()
    assert memory.matched("b", CHAIN) == (("expected", 256),)


def test_nothing_is_expected_of_the_dead_and_late_news_of_them_does_no_harm() -> None:
    memory = PlacementMemory()
    memory.placed("r1", "a", 10.0, AB, CHAIN[:4])
    memory.purge("a")
    assert memory.matched("a", CHAIN) == ()
    memory.placed("r2", "a", 10.0, AB, CHAIN[:1])
    memory.settled("r1")
    assert memory.matched("a", CHAIN) == (("expected", 64),)


def test_work_fades_as_more_is_placed_and_settles_at_the_share() -> None:
    memory = PlacementMemory()
    for i in range(4000):
        memory.placed(f"r{i}", AB[i % 4 == 0], 10.0, AB)
    recent = memory.recent_ms(AB)
    assert recent["a"] == pytest.approx(3 * recent["b"], rel=0.1)
    assert sum(recent.values()) == pytest.approx(10.0 * 2 * WINDOW_REQS, rel=0.05)


def test_a_newcomer_is_taken_for_one_of_many_and_not_flooded() -> None:
    memory = PlacementMemory()
    rng = random.Random(1)
    for i in range(500):
        memory.placed(f"r{i}", rng.choice(AB), 10.0, AB)
    recent = memory.recent_ms((*AB, "new"))
    assert recent["new"] == pytest.approx((recent["a"] + recent["b"]) / 2)


def test_nobody_has_done_anything_at_first() -> None:
    assert PlacementMemory().recent_ms(AB) == {"a": 0.0, "b": 0.0}
