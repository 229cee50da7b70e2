"""The routing benchmark on a small load: its own book-keeping, and what cache-aware placement must show."""

from __future__ import annotations

import pytest

from benchmarks.routing import Case, measure

CASE = Case(name="small", num_instances=3, rate=0.6, cache_pages=700, num_conversations=80)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    return {policy: measure(CASE, policy, 1) for policy in ("round-robin", "cache-aware")}


def test_every_policy_gets_the_same_load(found: dict[str, dict[str, float]]) -> None:
    assert found["round-robin"]["num_reqs"] == found["cache-aware"]["num_reqs"] > 200


def test_it_depends_on_the_seed_only(found: dict[str, dict[str, float]]) -> None:
    assert measure(CASE, "cache-aware", 1) == found["cache-aware"]
    assert measure(CASE, "cache-aware", 2) != found["cache-aware"]


def test_cache_aware_hits_nearly_what_can_be_hit_answers_sooner_and_shares_the_load(
    found: dict[str, dict[str, float]],
) -> None:
    turns, aware = found["round-robin"], found["cache-aware"]
    assert turns["of_ideal"] < 0.85
    assert aware["of_ideal"] >= 0.9
    assert aware["of_ideal"] <= 1.0
    assert aware["ttft_p50_ms"] < turns["ttft_p50_ms"]
    assert max(aware["load_busy"], aware["load_reqs"]) <= 1.3
