"""`xllm service` and `xllm instance` over a real etcd: start order, two fronts, outages, pauses, clones.

F27, F30, F31, F58, F62, each after a look whether the fault happened. The null device answers with hashes
of all KV that a row sees, so answers are compared as values.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer, BrokenStreamError, ask
from tests.faultlab.cluster import Cluster, cluster, is_ready, said, wait_connected, wait_for
from tests.faultlab.etcd import EtcdServer, free_port
from tests.faultlab.lab import body
from xllm.service.registry.address import Address
from xllm.service.registry.etcd import EtcdRegistry
from xllm.service.registry.record import MemberKind, MemberRecord, encode_record, member_key, member_prefix
from xllm.testing.server_process import ServerProcess

BODIES = [body(f"stream {i} " * (1 + i % 5), max_tokens=30 + 7 * (i % 4)) for i in range(12)]


@pytest.fixture
def town(tmp_path: Path, own_etcd: EtcdServer) -> Iterator[Cluster]:
    with cluster(tmp_path, own_etcd.url, pace_ms=2) as made:
        yield made


class Load:
    """Streams that never pause; every answer must be the golden one."""

    def __init__(self, service: ServerProcess, num_streams: int = 4) -> None:
        self.url = service.base_url
        self.num_streams = num_streams
        self.num_answers = 0
        self.wrong: list[Any] = []
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Load:
        self._wanted: list[Answer] = await golden(self.url, BODIES)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False)
        self._tasks = [asyncio.create_task(self._ask_on(i)) for i in range(self.num_streams)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._http.aclose()

    async def _ask_on(self, index: int) -> None:
        while not self._stop.is_set():
            index = (index + self.num_streams) % len(BODIES)
            try:
                answer = await ask(self._http, BODIES[index])
            except (BrokenStreamError, httpx.HTTPError, ValueError) as error:
                self.wrong.append(error)
                return
            self.num_answers += 1
            if answer.content() != self._wanted[index].content():
                self.wrong.append(index)

    async def more(self, count: int) -> None:
        """Wait until so many more answers have come."""
        goal = self.num_answers + count
        await until(lambda: self.num_answers >= goal or bool(self.wrong), f"{count} more answers")


async def until(condition: Any, what: str) -> None:
    await asyncio.to_thread(wait_for, condition, what)


def test_start_order_does_not_matter_and_two_fronts_serve(tmp_path: Path) -> None:
    """Service, instance, then etcd; then a second front, and the first one dies."""
    etcd = EtcdServer()
    try:
        with cluster(tmp_path, etcd.url, pace_ms=5) as town:
            first = town.service()
            assert not is_ready(first)
            instance = town.instance()
            assert not is_ready(first)
            wait_for(lambda: said(instance, "serving goes on") == 1, "the instance says it once")
            etcd.start()
            wait_connected(first, 1)
            wait_for(lambda: is_ready(first), "the first front is ready")
            second = town.service()
            wait_connected(second, 1)
            wait_for(lambda: len(asyncio.run(listed(etcd, "fronts"))) == 2, "both fronts are registered")
            wanted = asyncio.run(golden(first.base_url, BODIES))
            assert [a.content() for a in asyncio.run(golden(second.base_url, BODIES))] == [
                a.content() for a in wanted
            ]
            long = body("long " * 8, max_tokens=1500)
            with httpx.stream(
                "POST", f"{first.base_url}/v1/completions", json=long, timeout=60, trust_env=False
            ) as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("data: {")
                wait_for(lambda: second.metric("xllm:owned_pages") > 0, "the engine works on it")
                first.process.kill()
                first.process.wait()
            # Its engine frees what the dead front held, lives on, and answers the retry in the same words.
            wait_for(lambda: second.metric("xllm:owned_pages") == 0, "its pages are free")
            (again,) = asyncio.run(golden(second.base_url, [BODIES[0]]))
            assert again.content() == wanted[0].content()
            assert instance.process.poll() is None
    finally:
        etcd.close()


@pytest.mark.slow
def test_f27_etcd_down_under_load_costs_no_request(town: Cluster, own_etcd: EtcdServer) -> None:
    outage(town, own_etcd, outage_s=5.0)


def outage(town: Cluster, etcd: EtcdServer, *, outage_s: float) -> int:
    """Streams over two instances, no etcd for so long, one more instance meanwhile; answers given then."""
    service = town.service()
    members = town.instances(2)
    wait_connected(service, 2)

    async def scenario() -> int:
        async with Load(service) as load:
            await load.more(4)
            etcd.kill()
            assert etcd.process is not None
            assert etcd.process.poll() is not None, "etcd was not killed"
            began_s, before = time.monotonic(), load.num_answers
            late = await asyncio.to_thread(town.instance)
            await until(lambda: all(said(m, "serving goes on") for m in members), "the outage is noticed")
            # Longer than every lease.
            while time.monotonic() - began_s < outage_s:
                await load.more(4)
                assert not load.wrong
            answered = load.num_answers - before
            assert said(late, "registered as") == 0
            await asyncio.to_thread(etcd.start)
            await until(lambda: said(service, "is connected") == 3, "the new instance joins")
            await load.more(8)
        assert load.wrong == []
        assert said(service, "is lost") == 0, "an outage of the registry took a connection"
        return answered

    answered = asyncio.run(scenario())
    # Said after a renewal: etcd counts all leases anew from its start, and nobody alive lets one end.
    wait_for(lambda: all(said(m, "answers again") for m in members), "all members see it again")
    assert len(asyncio.run(listed(etcd))) == 3
    return answered


@pytest.mark.slow
def test_f30_a_paused_member_leaves_and_comes_back_with_a_new_epoch(
    town: Cluster, own_etcd: EtcdServer
) -> None:
    service = town.service()
    paused, steady = town.instances(2)
    wait_connected(service, 2)

    async def scenario() -> None:
        async with Load(service) as load:
            await load.more(4)
            paused.process.send_signal(signal.SIGSTOP)
            await until(lambda: said(service, "is suspected") == 1, "the pause is noticed")
            async with asyncio.timeout(20.0):
                while len(await listed(own_etcd)) != 1:  # its lease has ended
                    await load.more(1)
            await load.more(8)
            paused.process.send_signal(signal.SIGCONT)
            await until(lambda: said(paused, "registered as /") == 2, "it registers again")
            await until(
                lambda: said(service, "is back") + said(service, "is connected") >= 3, "it is used again"
            )
            await load.more(8)
        assert load.wrong == []

    asyncio.run(scenario())
    epochs = [int(line.rsplit(" ", 1)[1]) for line in paused.lines if "registered as /" in line]
    assert len(epochs) == 2
    assert epochs[0] < epochs[1]
    assert said(steady, "registered as /") == 1


@pytest.mark.slow
def test_f58_members_that_come_and_go_lose_no_request(town: Cluster) -> None:
    come_and_go(town, times=3)


def come_and_go(town: Cluster, *, times: int) -> int:
    """One instance stays, one comes and goes: by SIGTERM and by SIGKILL in turn. Answers given meanwhile."""
    service = town.service()
    town.instance()
    wait_connected(service, 1)

    async def scenario() -> int:
        async with Load(service) as load:
            await load.more(2)
            for number in range(times):
                flapping = await asyncio.to_thread(town.instance)
                await until(lambda n=number: said(service, "is connected") >= 2 + n, "it joins")
                await load.more(4)
                if number % 2:
                    flapping.process.kill()
                    await until(lambda n=number: said(service, "is lost") >= 1 + n, "its death is seen")
                else:
                    assert await asyncio.to_thread(flapping.stop, 20.0) == 0
                    assert said(flapping, "draining") == 1
        assert load.wrong == []
        return load.num_answers

    return asyncio.run(scenario())


def test_f62_a_clone_and_a_stranger_at_a_members_address_are_refused_by_name(
    town: Cluster, own_etcd: EtcdServer
) -> None:
    service = town.service()
    original = town.instance(instance_id="alpha", lease_ttl_s=1.0)
    wait_for(lambda: said(original, "registered as alpha") == 1, "the original is registered")
    wait_connected(service, 1)
    clone = town.instance(instance_id="alpha", lease_ttl_s=1.0)
    wait_for(lambda: clone.process.poll() is not None, "the clone gives up")
    assert clone.process.returncode == 2
    assert said(clone, f"'alpha' is taken by a live member at {original.base_url}, pid {original.pid}") == 1
    assert original.process.poll() is None
    # A record whose address was reused by something else, and one of a process that is long gone.
    asyncio.run(forge(own_etcd, "ghost", f"127.0.0.1:{own_etcd.port}"))
    asyncio.run(forge(own_etcd, "former", original.base_url))
    asyncio.run(forge(own_etcd, "nobody", f"127.0.0.1:{free_port()}"))
    for name in ("ghost", "former", "nobody"):
        wait_for(lambda name=name: said(service, f"{name} cannot be used") == 1, f"{name} is refused")
    (answer,) = asyncio.run(golden(service.base_url, [BODIES[0]]))
    assert len(answer.choices[0].token_ids) == BODIES[0]["max_tokens"]
    assert said(service, "is connected") == 1


async def listed(etcd: EtcdServer, kind: MemberKind = "instances") -> list[str]:
    """The keys of all members."""
    registry = EtcdRegistry([Address("127.0.0.1", etcd.port)])
    keys = [entry.key for entry in (await registry.list(member_prefix("default", kind))).entries]
    await registry.close()
    return keys


async def forge(etcd: EtcdServer, name: str, address: str) -> None:
    """A record that nobody stands behind."""
    registry = EtcdRegistry([Address("127.0.0.1", etcd.port)])
    record = MemberRecord(member_id=name, incarnation="another life", address=address)
    await registry.put(member_key("default", "instances", name), encode_record(record))
    await registry.close()


def test_without_a_registry_fixed_addresses_do_and_one_front_serves_two_models(tmp_path: Path) -> None:
    with cluster(tmp_path, "embedded") as town:
        one, two = town.instance(), town.instance(model="second")
        town.registry = f"static://{one.base_url},{two.base_url}"
        service = town.service()
        wait_connected(service, 2)
        wait_for(lambda: is_ready(service), "both models are served")
        models = httpx.get(f"{service.base_url}/v1/models", timeout=10, trust_env=False).json()["data"]
        assert {model["id"] for model in models} >= {"lab", "second"}
        both = [BODIES[0], BODIES[0] | {"model": "second"}]
        answers = asyncio.run(golden(service.base_url, both))
        assert all(len(a.choices[0].token_ids) == BODIES[0]["max_tokens"] for a in answers)
        assert one.stop() == 0
        (again,) = asyncio.run(golden(service.base_url, both[1:]))
        assert again.content() == answers[1].content()
