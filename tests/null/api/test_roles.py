"""GET and POST /v1/role and its alias: what they show, what they change, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from tests.null.api.conftest import ASSETS, MakeSite, Site, error_of
from xllm.service.instances.about import InstanceAbout
from xllm.testing.fake_engine import SampleEngine, sample_card

PATHS = ("/v1/role", "/v1/pd_role")


async def join(site: Site, name: str, *phases: str) -> SampleEngine:
    card = sample_card(ASSETS)
    engine = SampleEngine(card, ASSETS)
    await site.front.add_instance(engine.stream, card, name=name, about=InstanceAbout(phases=phases))
    return engine


async def roles(site: Site, path: str = PATHS[0]) -> dict[str, dict[str, Any]]:
    reply = await site.client.get(path)
    assert reply.status_code == 200
    return {i["instance"]: i for i in reply.json()["instances"]}


@pytest.mark.parametrize("path", PATHS)
async def test_roles_are_shown_and_changed_by_epoch(site: Site, path: str) -> None:
    other = await join(site, "other", "decode")
    shown = (await roles(site, path))["other"]
    assert (shown["role"], shown["pool"], shown["phases"]) == ("decode", "decode", ["decode"])
    assert (shown["reason"], shown["pinned"], shown["state"]) == ("started", False, "ready")
    body = {"instance": "other", "role": "mixed", "epoch": shown["epoch"]}
    reply = await site.client.post(path, json=body)
    assert reply.status_code == 200
    assert reply.json()["epoch"] > shown["epoch"]
    now = (await roles(site, path))["other"]
    assert (now["role"], now["reason"], now["pinned"], now["proven"]) == ("mixed", "operator", True, False)
    stale = await site.client.post(path, json={**body, "role": "decode"})
    assert stale.status_code == 409
    assert error_of(stale)["code"] == "conflict"
    assert str(now["epoch"]) in error_of(stale)["message"]
    assert (await roles(site, path))["other"]["epoch"] == now["epoch"]
    await other.close()


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"instance": "nobody", "role": "mixed"}, 404, "instance"),
        ({"role": "mixed"}, 400, "instance"),
        ({"instance": "engine-0"}, 400, "role"),
        ({"instance": "engine-0", "role": "boss"}, 400, "role"),
        ({"instance": 3, "role": "mixed"}, 400, "instance"),
        ({"instance": "engine-0", "role": "mixed", "epoch": "1"}, 400, "epoch"),
        ({"instance": "engine-0", "role": "mixed", "epoch": -1}, 400, "epoch"),
        ({"instance": "engine-0", "role": "mixed", "pinned": "yes"}, 400, "pinned"),
        ({"instance": "engine-0", "role": "mixed", "force": True}, 400, "force"),
        ({"instance": "x" * 1000, "role": "mixed"}, 400, "instance"),
        ({"instance": "engine-0", "role": "prefill"}, 409, "role"),
    ],
)
async def test_what_is_wrong_is_named_and_changes_nothing(
    site: Site, body: dict[str, Any], status: int, param: str
) -> None:
    before = await roles(site)
    reply = await site.client.post("/v1/role", json=body)
    assert reply.status_code == status, reply.text
    assert error_of(reply)["param"] == param
    after = await roles(site)
    for shown in (before, after):
        shown["engine-0"].pop("since_ms")
    assert before == after


@pytest.mark.parametrize("path", PATHS)
async def test_roles_are_for_administrators(make_site: MakeSite, path: str) -> None:
    site = await make_site(api_key=("k",), admin_key=("a",))
    body = {"instance": "engine-0", "role": "mixed"}
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer k"}, 403),
        ({"authorization": "Bearer a"}, 200),
    ):
        assert (await site.client.get(path, headers=headers)).status_code == status
        assert (await site.client.post(path, headers=headers, json=body)).status_code == status


async def test_other_methods_are_named(site: Site) -> None:
    reply = await site.client.delete("/v1/role")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "GET, POST"


async def test_instances_and_metrics_tell_of_pools_and_switches(site: Site) -> None:
    other = await join(site, "other", "decode")
    await site.client.post("/v1/role", json={"instance": "other", "role": "mixed"})
    listed = {i["id"]: i for i in (await site.client.get("/instances")).json()["instances"]}
    assert (listed["other"]["role"], listed["other"]["pool"]) == ("mixed", "mixed")
    lines = (await site.client.get("/metrics")).text.splitlines()
    assert 'xllm:pool_size{pool="mixed"} 2.0' in lines
    assert 'xllm:role_switches_total{from="decode",reason="operator",to="mixed"} 1.0' in lines
    await other.close()
