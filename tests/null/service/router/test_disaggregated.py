"""Placement among instances with roles: who computes the prompt, where it goes on; nobody is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.null.service.router.tables import SLO, instance, request
from tests.null.service.router.test_all_policies import NAMES, anything
from xllm.config import FrontConfig
from xllm.service.roles.board import Phases
from xllm.service.router.base import InstanceView, Placement, RequestView, RouterSnapshot
from xllm.service.router.disaggregated import place
from xllm.service.router.registry import load_policy
from xllm.types import DECODE, MIXED, PREFILL


def having(role: Phases, view: InstanceView, *, old: Phases = frozenset(), **more: int) -> InstanceView:
    return replace(view, phases=role, old_phases=old, **more)


def prefill(name: str, **load: object) -> InstanceView:
    return having(PREFILL, instance(name, **load))  # type: ignore[arg-type]


def decode(name: str, **load: object) -> InstanceView:
    return having(DECODE, instance(name, **load))  # type: ignore[arg-type]


def placed(
    view: RequestView, *instances: InstanceView, policy: str = "slo-aware", turn: int = 0, **config: float
) -> Placement:
    snapshot = RouterSnapshot(instances=tuple(sorted(instances, key=lambda i: i.name)), turn=turn)
    placement = place(load_policy(policy), view, snapshot, FrontConfig(**config))  # type: ignore[arg-type]
    assert placement is not None
    return placement


def pair(*args: object, **how: object) -> tuple[str, str | None]:
    placement = placed(*args, **how)  # type: ignore[arg-type]
    return placement.instance, placement.decode


@pytest.mark.parametrize("policy", NAMES)
def test_with_all_instances_mixed_it_is_the_policy_itself(policy: str) -> None:
    views = tuple(instance(n, backlog=b) for n, b in (("a", 500), ("b", 0), ("c", 4000)))
    snapshot = RouterSnapshot(instances=views, turn=5)
    for i in range(20):
        view = request(name=f"r{i}")
        assert place(load_policy(policy), view, snapshot, FrontConfig()) == load_policy(policy)(
            view, snapshot, FrontConfig()
        )


@pytest.mark.parametrize("policy", NAMES)
def test_prompts_go_to_prefill_and_go_on_at_decode(policy: str) -> None:
    views = (prefill("p1"), prefill("p2"), decode("d1"), decode("d2"))
    for i in range(8):
        p, d = pair(request(name=f"r{i}"), *views, policy=policy, turn=i)
        assert p in ("p1", "p2")
        assert d in ("d1", "d2")


def test_round_robin_takes_turns_on_both_sides() -> None:
    views = (prefill("p1"), prefill("p2"), decode("d1"), decode("d2"), decode("d3"))
    pairs = [pair(request(), *views, policy="round-robin", turn=t) for t in range(6)]
    assert [p for p, _ in pairs] == ["p1", "p2"] * 3
    assert [d for _, d in pairs] == ["d1", "d2", "d3"] * 2


def test_decode_is_where_fewest_tokens_run() -> None:
    busy = decode("d1", decoding=4, context=9000)
    assert pair(request(), prefill("p"), busy, decode("d2", decoding=4, context=800)) == ("p", "d2")


def test_what_is_on_its_way_counts_as_running() -> None:
    expecting = replace(decode("d1"), coming_reqs=3, coming_tokens=6000)
    assert pair(request(), prefill("p"), expecting, decode("d2", decoding=2, context=900)) == ("p", "d2")


def test_a_decoder_without_pages_is_passed_over() -> None:
    full = decode("d1", num_pages=100, free_pages=2)
    loaded = decode("d2", num_pages=100, free_pages=90, decoding=8, context=8000)
    assert pair(request(1000), prefill("p"), full, loaded) == ("p", "d2")


def test_pages_that_are_promised_are_not_free() -> None:
    promised = replace(decode("d1", num_pages=100, free_pages=50), coming_reqs=1, coming_tokens=45 * 64)
    other = decode("d2", num_pages=100, free_pages=50, decoding=8, context=80_000)
    assert pair(request(1000), prefill("p"), promised, other) == ("p", "d2")


def test_a_decoder_that_would_miss_the_time_per_token_is_passed_over_for_one_in_transition() -> None:
    slow = decode("d1", decoding=300, context=100, max_reqs=None)
    changing = having(DECODE, instance("d2", context=5000, decoding=2), old=PREFILL)
    assert pair(request(), prefill("p"), slow, changing, slo_tpot_ms=50.0) == ("p", "d2")
    calm = decode("d1", decoding=1, context=9000)
    assert pair(request(), prefill("p"), calm, changing, slo_tpot_ms=50.0) == ("p", "d1"), "stable pool first"


def test_where_nobody_keeps_the_time_the_smallest_miss_is_taken() -> None:
    views = (prefill("p"), decode("d1", decoding=90), decode("d2", decoding=80))
    placement = placed(request(), *views, slo_tpot_ms=10.0)
    assert placement.decode == "d2"
    assert "decode=d2:smallest_miss" in placement.reasons


def test_an_objective_of_the_request_counts_before_the_settings() -> None:
    views = (having(MIXED, instance("m", decoding=90)), decode("d", decoding=1, context=50_000))
    assert pair(request(slo=SLO(tpot_ms=20.0)), *views) == ("m", "d")
    assert pair(request(slo=SLO(tpot_ms=2000.0)), *views) == ("m", None)


def test_an_instance_that_also_decodes_keeps_its_request_when_it_can_serve_it() -> None:
    views = (having(MIXED, instance("m", decoding=5, context=2000)), decode("d"))
    placement = placed(request(), *views)
    assert (placement.instance, placement.decode) == ("m", None)
    assert "decode=m:stays" in placement.reasons


def test_one_token_needs_no_decoder() -> None:
    assert pair(request(max_tokens=1), prefill("p"), decode("d")) == ("p", None)


def test_if_every_decoder_is_full_it_stays() -> None:
    assert pair(request(), prefill("p"), decode("d", reqs=4, max_reqs=4)) == ("p", None)
    coming = replace(decode("d", reqs=2, max_reqs=4), coming_reqs=2)
    assert pair(request(), prefill("p"), coming) == ("p", None)


def test_prompts_stay_off_mixed_instances_unless_they_would_wait_too_long_or_nothing_is_predicted() -> None:
    mixed = having(MIXED, instance("m"))
    assert pair(request(), prefill("p", backlog=100), mixed)[0] == "p"
    assert pair(request(), prefill("p", backlog=30_000), mixed)[0] == "m"
    turns = {pair(request(), prefill("p"), mixed, policy="round-robin", turn=t)[0] for t in range(4)}
    assert turns == {"m", "p"}


def test_a_late_first_token_is_fetched_from_the_pool_in_transition() -> None:
    late, changing = prefill("p", backlog=30_000), having(PREFILL, instance("x"), old=DECODE)
    assert pair(request(), late, changing, decode("d"))[0] == "x"
    assert pair(request(), prefill("p", backlog=100), changing, decode("d"))[0] == "p"


def test_full_prefill_instances_give_way_to_the_pool_in_transition_and_then_to_anybody() -> None:
    full = prefill("p", reqs=4, max_reqs=4)
    changing = having(PREFILL, instance("x"), old=DECODE)
    assert pair(request(), full, changing, decode("d"))[0] == "x"
    placement = placed(request(), full, decode("d"))
    assert (placement.instance, placement.decode) == ("d", None)
    assert "pool=none_for_prefill" in placement.reasons


def test_what_has_spoken_is_recomputed_and_goes_on_at_a_decoder() -> None:
    view = request(attempt=1, num_emitted=5)
    assert pair(view, prefill("p"), decode("d", backlog=5000)) == ("d", None)
    assert pair(view, prefill("p"), prefill("q", backlog=100)) == ("p", None), "never refused"


def test_a_cost_that_only_the_other_pool_knows_is_used() -> None:
    """Decoders learn nothing of prompts, and new prefill instances have told nothing of either."""
    slow = (2.0, 10.0, 0.0, 0.3, 0.0002)
    placement = placed(request(1000), prefill("p", cost=()), decode("d", cost=slow))
    assert placement.ttft_ms is not None
    assert placement.ttft_ms > 10_000.0


def halved(view: InstanceView, half: tuple[float, ...]) -> InstanceView:
    return replace(view, engine=msgspec.structs.replace(view.engine, cost=(), half_cost=half))


def test_halves_of_a_cost_make_a_whole() -> None:
    """One that only computes prompts and one that only decodes know it together."""
    p = halved(prefill("p"), (9.0, 10.0, 0.0, 0.0, 0.0))
    d = halved(decode("d", decoding=10), (3.0, 0.0, 0.0, 2.0, 0.0))
    placement = placed(request(1000), p, d)
    assert placement.ttft_ms is not None
    assert placement.ttft_ms == pytest.approx(10_000.0, rel=0.01)
    assert placement.tpot_ms == pytest.approx(3.0 + 11 * 2.0)
    alone = placed(request(1000), p, halved(decode("d"), ()))
    assert alone.ttft_ms is not None
    assert alone.ttft_ms < 1000.0, "half of it says nothing"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_whatever_the_roles_it_is_placed_once_where_there_is_room_or_nobody_has_any(
    name: str, seed: int
) -> None:
    rng = random.Random(seed)
    roles = (PREFILL, DECODE, MIXED)
    views = []
    for n in range(rng.randint(1, 6)):
        role = rng.choice(roles)
        old = rng.choice([frozenset(), MIXED - role])
        view = having(role, anything(rng, f"i{n}"), old=old)
        views.append(replace(view, coming_reqs=rng.choice([0, 3]), coming_tokens=rng.choice([0, 700])))
    ask = request(
        rng.choice([1, 64, 3000]),
        name=f"r{seed}",
        max_tokens=rng.choice([1, 2, 100_000]),
        num_choices=rng.choice([1, 4]),
        num_emitted=rng.choice([0, 7]),
        slo=rng.choice([SLO(), SLO(ttft_ms=1.0, tpot_ms=1.0)]),
    )
    snapshot = RouterSnapshot(instances=tuple(views), turn=rng.randint(0, 9))
    placement = place(load_policy(name), ask, snapshot, FrontConfig())
    roomy = {v.name: v for v in views if v.has_room}
    if not roomy:
        assert placement is None
        return
    assert placement is not None
    assert placement.instance in roomy
    if any("prefill" in v.phases for v in roomy.values()) and not ask.num_emitted:
        assert "prefill" in roomy[placement.instance].phases
    if placement.decode is not None:
        assert placement.decode != placement.instance
        assert "decode" in roomy[placement.decode].phases
        assert not ask.num_emitted
    assert place(load_policy(name), ask, snapshot, FrontConfig()) == placement
