"""GET /usage, and that each request leaves exactly one record whatever became of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.null.api.conftest import ASSETS, error_of
from tests.null.api.test_streams import submitted
from xllm.api.app import create_app
from xllm.api.server import HttpServer
from xllm.clock import SystemClock
from xllm.config import FrontConfig, ServerConfig
from xllm.errors import InternalError
from xllm.service.front import Front
from xllm.service.usage import Totals, UsagePage, UsageQuery, UsageRecord, UsageRecorder
from xllm.service.usage.store import UsageCounts
from xllm.service.watch.desk import WatchDesk
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.wire.messages import Frame


class MemoryStore:
    """Keeps records and the last question."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.query: UsageQuery | None = None

    def add(self, record: UsageRecord) -> None:
        self.records.append(record)

    async def totals(self, query: UsageQuery) -> UsagePage:
        self.query = query
        row = Totals(
            key_id=query.key_id or "any",
            model="sample",
            num_requests=len(self.records),
            num_failed=0,
            prompt_tokens=5,
            cached_tokens=0,
            completion_tokens=6,
        )
        return UsagePage(rows=(row,), more=query.limit == 1)

    def counts(self) -> UsageCounts:
        return UsageCounts()

    async def close(self) -> None:
        return


class UsageSite:
    def __init__(self, base_url: str, engine: SampleEngine, store: MemoryStore) -> None:
        self.base_url, self.engine, self.store = base_url, engine, store

    async def ask(self, method: str, path: str, key: str = "k", **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", **more.pop("headers", {})}
        async with httpx.AsyncClient(base_url=self.base_url, trust_env=False, timeout=20) as client:
            return await client.request(method, path, headers=headers, **more)

    async def recorded(self, count: int) -> list[UsageRecord]:
        while len(self.store.records) < count:
            await asyncio.sleep(0.005)
        return self.store.records


@pytest.fixture
async def site() -> AsyncIterator[UsageSite]:
    clock, store = SystemClock(), MemoryStore()
    desk = WatchDesk(clock, UsageRecorder(store, clock, front_id="front-1"))
    front = Front(FrontConfig(), None, clock, observer=desk.observer)
    engine = SampleEngine(sample_card(ASSETS), ASSETS, auto=False)
    await front.add_instance(engine.stream, engine.card, name="engine-0")
    config = ServerConfig(port=0, api_key=("k", "other"), admin_key=("a",))
    server = HttpServer(create_app(front, config, clock=clock, desk=desk, usage=store), config)
    await server.start()
    yield UsageSite(f"http://127.0.0.1:{server.port}", engine, store)
    await server.drain(front, 5.0)
    await front.close()
    await engine.close()


BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0}


async def test_a_request_that_ends_is_recorded_once_without_its_key(site: UsageSite) -> None:
    asked = asyncio.create_task(
        site.ask("POST", "/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
    )
    spec = await submitted(site.engine)
    while not asked.done():
        site.engine.step()
        await asyncio.sleep(0)
    (record,) = await site.recorded(1)
    assert (record.request_id, record.client_id) == (spec.request_id, "mine-1")
    assert (record.prompt_tokens, record.completion_tokens) == (len(spec.prompt_token_ids), 6)
    assert (record.outcome, record.num_attempts, record.front_id) == ("length", 1, "front-1")
    assert len(record.key_id) == 16
    assert record.key_id == record.tenant == spec.tenant
    assert record.created_s > 1_700_000_000
    assert record.duration_s >= 0


@pytest.mark.parametrize("end", ["abort", "failure", "deadline"])
async def test_a_request_that_does_not_end_well_is_recorded_with_what_it_used(
    site: UsageSite, end: str
) -> None:
    headers = {"x-request-timeout": "0.2"} if end == "deadline" else {}
    asked = asyncio.create_task(site.ask("POST", "/v1/completions", json=BODY, headers=headers))
    spec = await submitted(site.engine)
    site.engine.step()
    if end == "abort":
        asked.cancel()
    elif end == "failure":
        error = InternalError("broken").info()
        site.engine.say(Frame(request_id=spec.request_id, offset=1, error=error, last=True))
    (record,) = await site.recorded(1)
    outcome = {"abort": "aborted", "failure": "internal_error", "deadline": "deadline_exceeded"}[end]
    assert record.outcome == outcome
    assert record.completion_tokens <= 1
    await asyncio.gather(asked, return_exceptions=True)
    assert len(site.store.records) == 1


async def test_refused_requests_use_nothing_and_leave_no_record(site: UsageSite) -> None:
    refused = await site.ask("POST", "/v1/completions", json={**BODY, "temperature": 9})
    assert refused.status_code == 400
    assert (await site.ask("POST", "/v1/completions", key="x", json=BODY)).status_code == 401
    assert site.store.records == []


async def test_a_key_sees_its_own_usage_and_an_admin_key_all(site: UsageSite) -> None:
    own = (await site.ask("GET", "/usage")).json()
    assert site.store.query is not None
    key_id = site.store.query.key_id
    assert own["data"][0]["key"] == key_id
    assert own["data"][0]["completion_tokens"] == 6
    assert (own["has_more"], own["next"]) == (False, None)
    assert (await site.ask("GET", f"/usage?key={key_id}")).status_code == 200
    other = await site.ask("GET", f"/usage?key={key_id}", key="other")
    assert (other.status_code, error_of(other)["code"]) == (403, "permission_denied")
    everything = await site.ask(
        "GET", "/usage?since=10&until=20.5&model=m&limit=1&after_key=&after_model=z", key="a"
    )
    assert everything.json()["next"] == {"after_key": "any", "after_model": "sample"}
    assert site.store.query == UsageQuery(since_s=10.0, until_s=20.5, model="m", limit=1, after=("", "z"))
    assert (await site.ask("GET", f"/usage?key={key_id}", key="a")).json()["data"][0]["key"] == key_id


@pytest.mark.parametrize(
    "query",
    [
        "nope=1",
        "since=x",
        "since=nan",
        "until=inf",
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=%C2%B2",
        "after_key=x",
    ]
    + ["key", "since=1&since=2", "model=" + "m" * 300, "=", "&".join(f"limit={n}" for n in range(1, 12))],
)
async def test_other_questions_are_400(site: UsageSite, query: str) -> None:
    response = await site.ask("GET", f"/usage?{query}", key="a")
    assert response.status_code == 400, response.text
    error_of(response)


async def test_without_a_store_there_is_nothing_to_show(make_site: Any) -> None:
    plain = await make_site(admin_key=("a",))
    response = await plain.client.get("/usage", headers={"authorization": "Bearer a"})
    assert (response.status_code, error_of(response)["code"]) == (404, "usage_off")
    nobody = await plain.client.get("/usage")
    assert (nobody.status_code, error_of(nobody)["code"]) == (403, "permission_denied")
