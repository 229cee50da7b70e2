"""Cache-aware: where the prefix is, until that instance has more than its share.

Several cases are defects that a well-known service of this kind has: whole-number scores, tiers without
weights, no way out of a hot spot, no answer at a cold start.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.null.service.router.tables import COST, ask, chosen, instance, request
from xllm.service.router.base import InstanceView
from xllm.service.router.cache_aware import GRACE_REQS, MAX_REQS_SHARE, NUM_MATCHES, cache_aware


def hit(tokens: int, tier: str = "device") -> tuple[tuple[str, int], ...]:
    return ((tier, tokens),)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (instance("a"), instance("b", matched=hit(640))),
        (instance("a", matched=hit(448)), instance("b", matched=hit(640))),
        (instance("a", matched=hit(640, "dram")), instance("b", matched=hit(640))),
        (instance("a", matched=hit(640, "ssd")), instance("b", matched=hit(640, "dram"))),
        (instance("a", matched=hit(640, "remote")), instance("b", matched=hit(640, "ssd"))),
        (instance("a", matched=hit(640, "expected")), instance("b", matched=hit(640))),
        (instance("a"), instance("b", matched=hit(640, "expected"))),
        (instance("a", matched=hit(640, "remote")), instance("b", matched=hit(448))),
        (instance("a", matched=hit(640), backlog=3000), instance("b")),
        (instance("a", matched=hit(640), decoding=30, context=30_000), instance("b")),
        (instance("a"), instance("b", matched=hit(640), backlog=100)),
        (instance("a", matched=hit(64)), instance("b", matched=hit(640), backlog=300)),
    ],
    ids=[
        "a hit beats none",
        "part of a match counts in proportion",
        "device over dram",
        "dram over ssd",
        "ssd over remote",
        "there over expected",
        "expected over nothing",
        "near pages over more far ones",
        "a queue outweighs a hit",
        "company outweighs a hit",
        "a hit outweighs a short queue",
        "the longer hit outweighs a queue",
    ],
)
def test_saved_time_against_waiting_time(worse: InstanceView, better: InstanceView) -> None:
    assert chosen(cache_aware, request(), worse, better) == "b"


def test_the_tiers_of_one_instance_add_up() -> None:
    both = instance("b", matched=(("device", 320), ("dram", 320)))
    assert chosen(cache_aware, request(), instance("a", matched=hit(448)), both) == "b"
    assert chosen(cache_aware, request(), instance("a", matched=hit(640)), both) == "a"


def test_more_pages_than_the_prompt_has_are_no_larger_hit() -> None:
    longer = instance("a", matched=hit(100_000))
    placement = ask(cache_aware, request(1000), longer, instance("b"))
    assert placement is not None
    assert "hit_tokens=999/1000" in placement.reasons


def test_a_slow_instance_is_not_preferred_for_having_more_to_save() -> None:
    slow = instance("a", cost=tuple(4 * c for c in COST), matched=hit(320))
    assert chosen(cache_aware, request(), slow, instance("b", matched=hit(320))) == "b"
    assert chosen(cache_aware, request(), slow, instance("b")) == "b"


def test_the_least_loaded_is_always_a_candidate() -> None:
    """Every other holder queues: without this rule the request would have to, too."""
    holders = [instance(f"h{i}", matched=hit(640), backlog=4000) for i in range(NUM_MATCHES + 2)]
    placement = ask(cache_aware, request(), *holders, instance("idle"))
    assert placement is not None
    assert placement.instance == "idle"
    assert len(placement.scores) == NUM_MATCHES + 1


def test_a_hot_prefix_leaves_its_only_holder_when_that_has_had_its_share() -> None:
    others = [instance(n, recent=100.0) for n in "bc"]
    view = request(1000)
    assert chosen(cache_aware, view, instance("a", matched=hit(320), recent=150.0), *others) == "a"
    placement = ask(cache_aware, view, instance("a", matched=hit(320), recent=2000.0), *others)
    assert placement is not None
    assert placement.instance in "bc"
    assert "over_share=a" in placement.reasons


def test_what_is_cheap_to_have_elsewhere_leaves_before_what_only_one_knows() -> None:
    """Of a hundred requests' worth of work, and a fifth over the share."""
    a, b = {"recent": 12_500.0}, {"recent": 9_400.0}
    common, own = hit(640), hit(960)
    for matched_b, matched_a, where in ((common, common, "b"), (common, own, "b"), ((), own, "a")):
        views = instance("a", matched=matched_a, **a), instance("b", matched=matched_b, **b)  # type: ignore[arg-type]
        assert chosen(cache_aware, request(1000), *views) == where, (matched_a, matched_b)


def test_an_instance_with_far_more_requests_attracts_no_more_even_with_no_memory_of_work() -> None:
    """Another front may have sent them: only the engine's count shows it. Steps cost next to nothing
    here, so that it is this rule that decides and not the queue."""
    light = (0.001, 0.0, 0.0, 0.0, 0.0)
    mean = 8.0
    most = int(MAX_REQS_SHARE * (mean + 0.5)) + GRACE_REQS
    for reqs, over in ((most - 1, False), (most, True)):
        crowded = instance("a", reqs=reqs, cost=light, matched=hit(640))
        placement = ask(cache_aware, request(), crowded, instance("b", reqs=int(2 * mean) - reqs, cost=light))
        assert placement is not None
        assert ("over_share=a" in placement.reasons) is over


def test_where_all_are_over_their_share_the_request_is_still_placed() -> None:
    crowd = [instance(n, reqs=50, decoding=50, context=50_000, matched=hit(640), recent=1e6) for n in "ab"]
    assert chosen(cache_aware, request(), *crowd) in ("a", "b")


def test_new_prompts_go_to_who_got_least_lately() -> None:
    assert chosen(cache_aware, request(), instance("a", recent=50.0), instance("b", recent=40.0)) == "b"


def test_a_resumed_request_counts_what_it_has_said_as_prompt() -> None:
    matched = instance("a", matched=hit(1280))
    placement = ask(cache_aware, request(1000, attempt=1, num_emitted=500), matched, instance("b"))
    assert placement is not None
    assert "hit_tokens=1280/1500" in placement.reasons


def test_scores_and_reasons_carry_the_numbers() -> None:
    placement = ask(cache_aware, request(), instance("a", matched=hit(640)), instance("b", backlog=100))
    assert placement is not None
    assert dict(placement.scores).keys() == {"a", "b"}
    assert dict(placement.scores)["a"] > dict(placement.scores)["b"]
    words = {reason.split("=")[0] for reason in placement.reasons}
    assert {"hit_tokens", "saved_ms", "queue_ms", "tpot_ms", "recent_ms", "cost"} <= words
    assert placement.ttft_ms is not None
    assert placement.work_ms > 0.0


def test_idle_holders_share_a_hot_prefix() -> None:
    holders = [instance(n, matched=hit(640)) for n in "abc"]
    counts = Counter(chosen(cache_aware, request(name=f"r{i}"), *holders) for i in range(300))
    assert min(counts.values()) > 60
