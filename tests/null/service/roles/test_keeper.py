"""Roles at a front with engines: who gets what, when old work is worked off, proof, rollback, control."""

from __future__ import annotations

from typing import Any

import pytest

from tests.null.service.conftest import House, collect, turns
from xllm.config import ClusterConfig, FrontConfig
from xllm.errors import NotFoundError, RequestError, UnavailableError
from xllm.service.cluster import ClusterService
from xllm.service.instances.about import InstanceAbout
from xllm.service.roles.board import Standing
from xllm.service.roles.keeper import PROOF_S
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine
from xllm.types import EngineSnapshot
from xllm.wire.messages import Stats


def role(*phases: str, endpoints: tuple[str, ...] = ("tcp:127.0.0.1:1",)) -> dict[str, Any]:
    """`endpoints` () = nothing can be handed over to it or from it."""
    return {"about": InstanceAbout(phases=phases, endpoints=endpoints)}


async def pair(house: House, **how: Any) -> tuple[SampleEngine, SampleEngine]:
    """engine-0 takes prompts, engine-1 decodes."""
    prefill = await house.engine(join=role("prefill"), **how)
    decode = await house.engine(join=role("decode"), **how)
    return prefill, decode


def inbound(house: House, name: str) -> int:
    """Requests that are to go on there."""
    return sum(len(i.inbound) for i in house.front._catalogue.instances() if i.name == name)


def standing(house: House, name: str) -> Standing:
    return next(i.standing for i in house.front.snapshot().instances if i.name == name)


async def test_new_requests_go_to_prefill_and_are_expected_at_decode(house: House) -> None:
    prefill, decode = await pair(house, auto=False)
    placed: list[tuple[str, str | None]] = []
    house.front._dispatch._observer.on_placed = lambda rid, p, attempt: placed.append((p.instance, p.decode))  # type: ignore[method-assign]
    streams = [await house.submit() for _ in range(3)]
    await turns(lambda: len(prefill.request_ids) == 3)
    assert decode.request_ids == ()
    assert placed == [("engine-0", "engine-1")] * 3
    assert inbound(house, "engine-1") == 3
    for stream in streams:
        await stream.aclose()
    assert inbound(house, "engine-1") == 0


async def test_a_group_is_ready_when_both_phases_are_there_and_stays_so_after_a_loss(house: House) -> None:
    await house.engine(join=role("prefill"))
    assert house.front.ready() == (False, "no_decode")
    decode = await house.engine(join=role("decode"))
    assert house.front.ready() == (True, "ready")
    decode.crash()
    await turns(lambda: len(house.front.snapshot().instances) == 1)
    assert house.front.ready() == (True, "ready"), "whoever is left does everything"
    stream = await house.submit(max_tokens=3)
    assert len(await collect(stream)) > 0


async def test_the_role_that_an_instance_was_given_outlives_its_process(house: House) -> None:
    _, decode = await pair(house)
    await house.engine(name="third", join=role("decode"))
    epoch = house.front.set_role("engine-1", "prefill", None, pinned=True).epoch
    decode.crash()
    await turns(lambda: len(house.front.snapshot().instances) == 2)
    await house.engine(name="engine-1", join=role("decode"))
    assert standing(house, "engine-1").role == "prefill"
    assert standing(house, "engine-1").epoch == epoch


async def test_new_work_at_once_while_the_old_is_worked_off(house: House) -> None:
    engines = [
        await house.engine(join=role(*p, endpoints=()), auto=False)
        for p in (("prefill",), ("decode",), ("decode",))
    ]
    stream = await house.submit(max_tokens=4)
    await turns(lambda: engines[0].request_ids != ())
    engines[0].step()
    await turns(lambda: house.front._dispatch.is_answered(stream.request_id))
    house.front.set_role("engine-0", "mixed", None, pinned=True)
    house.front.set_role("engine-0", "prefill", None, pinned=True)
    assert standing(house, "engine-0").pool == "mixed-to-prefill", "it decodes a request of its own"
    house.pass_time(1.2)
    assert standing(house, "engine-0").old_phases == {"decode"}
    while engines[0].step():
        await turns(lambda: house.front.snapshot().num_inflight_reqs == 0 or engines[0].request_ids != ())
    await turns(lambda: house.front.snapshot().num_inflight_reqs == 0)
    house.pass_time(1.2)
    assert standing(house, "engine-0").pool == "prefill"
    await collect(stream)


async def test_prompts_that_are_answered_are_worked_off(house: House) -> None:
    prefill = await house.engine(join=role("prefill", endpoints=()), auto=False)
    await house.engine(join=role("decode", endpoints=()), auto=False)
    await house.engine(name="other", join=role("prefill"), auto=False)
    stream = await house.submit(max_tokens=4)
    await turns(lambda: prefill.request_ids != ())
    house.front.set_role("engine-0", "decode", None, pinned=True)
    assert standing(house, "engine-0").pool == "prefill-to-decode"
    prefill.step()
    await turns(lambda: house.front._dispatch.is_answered(stream.request_id))
    house.pass_time(1.2)
    assert standing(house, "engine-0").pool == "decode", "what decodes there may stay"
    await stream.aclose()


async def test_what_is_on_its_way_to_a_former_decoder_counts_as_its_old_work(house: House) -> None:
    await pair(house, auto=False)
    await house.engine(name="other", join=role("mixed", "prefill", "decode"), auto=False)
    stream = await house.submit(max_tokens=4)
    target = next(i.name for i in house.front.snapshot().instances if inbound(house, i.name))
    house.front.set_role(target, "prefill", None, pinned=True)
    house.pass_time(1.2)
    assert standing(house, target).old_phases == {"decode"}
    await stream.aclose()
    house.pass_time(1.2)
    assert standing(house, target).old_phases == frozenset()


@pytest.mark.parametrize(
    ("name", "to", "error", "param"),
    [
        ("nobody", "mixed", NotFoundError, "instance"),
        ("engine-0", "encode", RequestError, "role"),
        ("engine-0", "decode", RequestError, "role"),
        ("engine-1", "prefill", RequestError, "role"),
    ],
)
async def test_what_cannot_be_switched_is_refused(
    house: House, name: str, to: str, error: type[Exception], param: str
) -> None:
    await pair(house)
    before = house.front.snapshot()
    with pytest.raises(error) as refused:
        house.front.set_role(name, to, None, pinned=True)
    assert refused.value.param == param  # type: ignore[attr-defined]
    assert house.front.snapshot().instances == before.instances


async def test_a_stale_epoch_is_told_before_the_floor(house: House) -> None:
    await pair(house)
    with pytest.raises(RequestError, match="epoch is") as refused:
        house.front.set_role("engine-1", "prefill", 99, pinned=True)
    assert (refused.value.code, refused.value.param) == ("conflict", "epoch")


async def test_a_front_that_does_not_lead_refuses_and_controls_nothing(house: House) -> None:
    house.reconfigure(role_control="adaptive")
    await pair(house)
    house.front.roles.why_not = lambda: "roles are changed at another front"
    with pytest.raises(UnavailableError, match="another front"):
        house.front.set_role("engine-1", "mixed", None, pinned=True)


async def test_a_switch_that_gets_no_work_done_is_taken_back(house: House) -> None:
    _, decode = await pair(house, auto=False)
    house.front.set_role("engine-1", "mixed", None, pinned=True)
    house.front.set_role("engine-0", "mixed", None, pinned=True)
    streams = [await house.submit() for _ in range(4)]
    await turns(lambda: decode.request_ids != ())
    house.pass_time(PROOF_S - 1.0)
    assert standing(house, "engine-1").role == "mixed"
    house.pass_time(3.0)
    assert (standing(house, "engine-1").role, standing(house, "engine-1").reason) == ("decode", "unproven")
    assert house.front.snapshot().num_role_switches["mixed", "decode", "unproven"] == 1
    for stream in streams:
        await stream.aclose()


async def test_the_first_result_proves_a_switch(house: House) -> None:
    _, decode = await pair(house, auto=False)
    house.front.set_role("engine-1", "mixed", None, pinned=True)
    streams = [await house.submit(max_tokens=50) for _ in range(4)]
    await turns(lambda: decode.request_ids != ())
    decode.step()
    await turns(lambda: not standing(house, "engine-1").unproven)
    house.pass_time(PROOF_S + 3.0)
    assert standing(house, "engine-1").role == "mixed"
    for stream in streams:
        await stream.aclose()


async def test_a_switch_without_work_is_neither_proven_nor_taken_back(house: House) -> None:
    await pair(house)
    house.front.set_role("engine-1", "mixed", None, pinned=True)
    house.pass_time(3 * PROOF_S)
    assert standing(house, "engine-1").role == "mixed"
    assert standing(house, "engine-1").unproven == {"prefill"}


async def flooded(house: House) -> SampleEngine:
    """One for prompts that is far behind, two decoders; told by the engines themselves."""
    prefill = await house.engine(join=role("prefill"), auto=False)
    for _ in range(2):
        await house.engine(join=role("decode"), auto=False)
    prefill.tell(Stats(snapshot=EngineSnapshot(backlog_tokens=90_000, num_requests=5, num_running=1)))
    await turns(lambda: house.front.snapshot().instances[0].engine.backlog_tokens == 90_000)
    return prefill


async def test_adaptive_control_switches_within_two_periods_and_says_why(house: House) -> None:
    house.reconfigure(role_control="adaptive")
    told: list[tuple[str, ...]] = []
    await flooded(house)
    house.front.roles._observer.on_role = lambda *facts: told.append(facts)  # type: ignore[method-assign]
    house.pass_time(1.4)
    switched = [i for i in house.front.snapshot().instances if i.standing.reason == "ttft"]
    assert {i.standing.role for i in switched} == {"mixed"}
    assert {facts[0] for facts in told} == {i.name for i in switched}
    assert "ttft=" in told[0][4]


async def test_where_nothing_can_be_handed_over_roles_are_names(house: House) -> None:
    house.reconfigure(role_control="adaptive")
    engines = [
        await house.engine(join=role(phase, endpoints=()), auto=False) for phase in ("prefill", "decode")
    ]
    streams = [await house.submit() for _ in range(2)]
    await turns(lambda: all(engine.request_ids for engine in engines))
    engines[0].tell(Stats(snapshot=EngineSnapshot(backlog_tokens=90_000, num_requests=5, num_running=1)))
    await turns(lambda: house.front.snapshot().instances[0].engine.backlog_tokens == 90_000)
    house.pass_time(5.0)
    assert house.front.snapshot().num_role_switches == {}
    for stream in streams:
        await stream.aclose()


async def test_engines_that_are_still_starting_are_not_made_up_for(house: House) -> None:
    house.reconfigure(role_control="adaptive")
    await house.engine(join=role("prefill"))
    await house.engine(join=role("prefill"))
    house.pass_time(5.0)
    assert house.front.snapshot().num_role_switches == {}


async def test_static_control_switches_nothing(house: House) -> None:
    await flooded(house)
    house.pass_time(20.0)
    assert house.front.snapshot().num_role_switches == {}


async def test_adaptive_control_leaves_alone_what_an_operator_has_set(house: House) -> None:
    house.reconfigure(role_control="adaptive")
    await flooded(house)
    for name in ("engine-1", "engine-2"):
        house.front.set_role(name, "decode", None, pinned=True)
    house.pass_time(10.0)
    assert house.front.snapshot().num_role_switches == {}
    house.front.set_role("engine-1", "decode", None, pinned=False)
    house.pass_time(3.0)
    assert standing(house, "engine-1").reason == "ttft"


async def test_the_last_decoder_lost_is_made_up_for(house: House) -> None:
    house.reconfigure(role_control="adaptive")
    await house.engine(join=role("prefill"))
    await house.engine(join=role("prefill"))
    decode = await house.engine(join=role("decode"))
    decode.crash()
    await turns(lambda: len(house.front.snapshot().instances) == 2)
    house.pass_time(1.2)
    assert {i.standing.reason for i in house.front.snapshot().instances} == {"started", "floor"}


async def test_a_front_that_may_share_its_registry_changes_no_roles() -> None:
    shared = ClusterConfig(registry="etcd://127.0.0.1:1")
    service = ClusterService(FrontConfig(role_control="adaptive"), shared, FakeClock())
    with pytest.raises(UnavailableError, match="labels of one front"):
        service.front.set_role("a", "mixed", None, pinned=True)
    await service.close()
    alone = ClusterService(FrontConfig(), ClusterConfig(registry="static://127.0.0.1:1"), FakeClock())
    with pytest.raises(NotFoundError):
        alone.front.set_role("a", "mixed", None, pinned=True)
    await alone.close()
