"""A whole HTTP server over a real front and a sample engine, in one event loop, on a free port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from xllm.api.app import App, create_app
from xllm.api.metrics import Metrics
from xllm.api.server import HttpServer
from xllm.clock import SystemClock
from xllm.config import FrontConfig, ServerConfig
from xllm.observability.tracing import Tracer
from xllm.service.front import Front
from xllm.service.watch.desk import WatchDesk
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.testing.tiny_tokenizer import tiny_assets

ASSETS = tiny_assets(512)


@dataclass
class Site:
    """One server. `client` speaks to it; `engine` is scripted by the test."""

    app: App
    front: Front
    engine: SampleEngine
    server: HttpServer
    client: httpx.AsyncClient
    metrics: Metrics
    openers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.server.port

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "sample", "prompt": "hello", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return await self.client.post(
            "/v1/chat/completions", json={"model": "sample", "messages": messages, **body}
        )

    async def raw(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own, with `data` already sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.openers.append(writer)
        writer.write(data)
        await writer.drain()
        return reader, writer


MakeSite = Callable[..., Any]


@pytest.fixture
async def make_site() -> AsyncIterator[MakeSite]:
    """`await make_site(engine={...}, front={...}, **server_config)`; everything is closed afterwards."""
    made: list[Site] = []

    async def make(
        engine: dict[str, Any] | None = None,
        front: dict[str, Any] | None = None,
        tracer: Tracer | None = None,
        **config: Any,
    ) -> Site:
        metrics = Metrics()
        desk = WatchDesk(SystemClock(), metrics, tracer=tracer)
        house = Front(FrontConfig(**(front or {})), None, SystemClock(), observer=desk.observer)
        card = sample_card(ASSETS)
        sample = SampleEngine(card, ASSETS, **(engine or {}))
        await house.add_instance(sample.stream, card, name="engine-0")
        server_config = ServerConfig(port=0, **config)
        app = create_app(house, server_config, clock=SystemClock(), metrics=metrics, desk=desk)
        server = HttpServer(app, server_config)
        await server.start()
        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}", timeout=20, trust_env=False, verify=False
        )
        made.append(Site(app, house, sample, server, client, metrics))
        return made[-1]

    yield make
    for site in made:
        await site.client.aclose()
        for writer in site.openers:
            writer.transport.abort()
        await site.server.drain(site.front, 5.0)
        await site.front.close()
        await site.engine.close()


@pytest.fixture
async def site(make_site: MakeSite) -> Site:
    made: Site = await make_site()
    return made


def events(text: str) -> list[Any]:
    """The `data:` payloads of an SSE body; '[DONE]' as it is."""
    assert text.endswith("\n\n")
    blocks = [b for b in text.split("\n\n") if b and not b.startswith(":")]
    assert all(b.startswith("data: ") for b in blocks), blocks
    payloads = [b.removeprefix("data: ") for b in blocks]
    return [p if p == "[DONE]" else json.loads(p) for p in payloads]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, checked against the envelope all of them share."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error
