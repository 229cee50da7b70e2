"""The wire between a front and its engines is cut, goes silent or is late (F20, F24).

A service over fixed addresses; one of its two instances is reached through a proxy that misbehaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer, ask
from tests.faultlab.cluster import cluster, num_connected, wait_connected, wait_for
from tests.faultlab.lab import body
from tests.faultlab.tcpproxy import HEALTHY, TcpProxy, Toxics
from xllm.testing.server_process import ServerProcess

STREAMS = [body(f"stream {i} " * (i + 1), max_tokens=150) for i in range(8)]


class Town:
    """Two instances, one behind `proxy`, and the front before them. One for all tests: see `begin`."""

    def __init__(self, proxy: TcpProxy, service: ServerProcess) -> None:
        self.proxy, self.service = proxy, service
        self.wanted = asyncio.run(golden(service.base_url, STREAMS))
        self._before: dict[str, float] = {}

    def begin(self) -> None:
        """Healthy, with both instances ready; what was counted so far does not count."""
        self.proxy.set(HEALTHY)
        wait_for(lambda: num_ready(self.service) == 2, "both instances are ready")
        self._before = self.service.metrics()

    def count(self, name: str) -> float:
        """Of a counter, since `begin`."""
        before = sum(v for k, v in self._before.items() if k == name or k.startswith(name + "{"))
        return self.service.count(name) - before

    def during(self, fault: Callable[[], Any]) -> list[Answer]:
        """All streams at once, with the fault when every one of them has begun."""
        return asyncio.run(self._during(fault))

    async def _during(self, fault: Callable[[], Any]) -> list[Answer]:
        before = self.service.metric("xllm:requests_accepted_total")
        async with httpx.AsyncClient(base_url=self.service.base_url, timeout=90, trust_env=False) as http:
            streams = [asyncio.create_task(ask(http, one)) for one in STREAMS]

            def begun() -> bool:
                return self.service.metric("xllm:requests_accepted_total") >= before + len(STREAMS)

            await asyncio.to_thread(wait_for, begun, "all streams are accepted")
            await asyncio.to_thread(fault)
            return list(await asyncio.gather(*streams))


def num_ready(service: ServerProcess) -> int:
    seen = httpx.get(f"{service.base_url}/instances", timeout=30, trust_env=False).json()["instances"]
    return sum(instance["state"] == "ready" for instance in seen)


@pytest.fixture(scope="module")
def shared_town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("town")
    with cluster(folder, "embedded", pace_ms=6, router_policy="round-robin") as made:
        one, two = made.instance(), made.instance()
        with TcpProxy(int(one.base_url.rsplit(":", 1)[1])) as proxy:
            made.registry = f"static://127.0.0.1:{proxy.port},{two.base_url}"
            service = made.service()
            wait_connected(service, 2)
            yield Town(proxy, service)


@pytest.fixture
def town(shared_town: Town) -> Town:
    shared_town.begin()
    return shared_town


def contents(answers: list[Answer]) -> list[Any]:
    return [answer.content() for answer in answers]


@pytest.mark.parametrize("reset", [False, True])
def test_f24_a_connection_cut_in_mid_stream_is_not_seen(town: Town, reset: bool) -> None:
    cut = []
    connected = num_connected(town.service)
    got = town.during(lambda: cut.append(town.proxy.cut(reset=reset)))
    assert cut[0] >= 1, "nothing was cut"
    assert contents(got) == contents(town.wanted)
    assert town.count("xllm:requests_moved_total") >= 1
    wait_for(lambda: num_connected(town.service) > connected, "the front connected anew")


@pytest.mark.slow
def test_f24_a_route_that_swallows_everything_is_a_silent_engine(town: Town) -> None:
    got = town.during(lambda: town.proxy.set(Toxics(blackhole=True)))
    assert contents(got) == contents(town.wanted)
    assert town.count("xllm:instance_suspicions_total") >= 1
    town.proxy.set(HEALTHY)
    assert contents(asyncio.run(golden(town.service.base_url, STREAMS))) == contents(town.wanted)


def test_f20_a_late_network_raises_no_alarm(town: Town) -> None:
    connected = num_connected(town.service)
    got = town.during(lambda: town.proxy.set(Toxics(latency_s=0.2)))
    assert contents(got) == contents(town.wanted)
    assert town.count("xllm:instance_suspicions_total") == 0
    assert num_connected(town.service) == connected
