"""Members and a front's directory over a real etcd under its faults: F29, F31, F32 and a wiped store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aetcd import rpc

from tests.faultlab.etcd import EtcdServer
from tests.faultlab.tcpproxy import HEALTHY, TcpProxy, Toxics
from xllm.clock import SystemClock
from xllm.service.registry.address import Address
from xllm.service.registry.base import Registry
from xllm.service.registry.directory import Change, RegistryDirectory
from xllm.service.registry.etcd import EtcdRegistry
from xllm.service.registry.leader import Leadership
from xllm.service.registry.membership import Membership
from xllm.service.registry.record import MemberRecord, encode_record, member_key, member_prefix

TTL_S = 1.0


async def until(done: Callable[[], bool], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not done():
            await asyncio.sleep(0.01)


@dataclass
class Town:
    """A cluster of its own in the store; what is under test goes through `proxy`, the operator does not."""

    proxy: TcpProxy
    operator: EtcdRegistry
    kv: object
    name: str = field(default_factory=lambda: f"c-{uuid.uuid4().hex[:8]}")
    registries: list[Registry] = field(default_factory=list)
    members: list[Membership] = field(default_factory=list)
    directories: list[RegistryDirectory] = field(default_factory=list)
    view: dict[str, str] = field(default_factory=dict)
    num_left: int = 0

    def registry(self) -> Registry:
        made = EtcdRegistry([Address("127.0.0.1", self.proxy.port)], call_timeout_s=0.5)
        self.registries.append(made)
        return made

    async def member(self, name: str, ttl_s: float = TTL_S) -> Membership:
        record = MemberRecord(member_id=name, incarnation=f"{name}-1", address="127.0.0.1:4000")
        made = Membership(self.registry(), self.name, "instances", record, ttl_s=TTL_S, clock=SystemClock())
        self.members.append(made)
        made.start()
        await made.join()
        return made

    async def directory(self, relist_s: float = 60.0) -> RegistryDirectory:
        made = RegistryDirectory(self.registry(), self.name, "instances", relist_s=relist_s)
        self.directories.append(made)
        made.start(self.on_change)
        await made.listed()
        return made

    def on_change(self, change: Change) -> None:
        for member in (*change.joined, *change.changed):
            self.view[member.record.member_id] = member.record.state
        for member in change.left:
            self.num_left += 1
            del self.view[member.record.member_id]

    def key(self, name: str) -> str:
        return member_key(self.name, "instances", name)

    async def compact(self) -> int:
        """All history up to now; the revision."""
        revision = (await self.operator.list(member_prefix(self.name, "instances"))).revision
        await self.kv.Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5.0)  # type: ignore[attr-defined]
        return revision

    async def close(self) -> None:
        for directory in self.directories:
            await directory.close()
        for member in self.members:
            await member.leave()
        for registry in self.registries:
            await registry.close()


async def town_on(server: EtcdServer) -> AsyncIterator[Town]:
    endpoint = Address("127.0.0.1", server.port)
    operator, channel = EtcdRegistry([endpoint]), rpc.insecure_channel(str(endpoint))
    with TcpProxy(server.port) as proxy:
        made = Town(proxy=proxy, operator=operator, kv=rpc.KVStub(channel))
        yield made
        await asyncio.to_thread(proxy.set, HEALTHY)
        await made.close()
    await operator.close()
    await channel.close()


@pytest.fixture
async def town(etcd_server: EtcdServer) -> AsyncIterator[Town]:
    async for made in town_on(etcd_server):
        yield made


@pytest.fixture
async def own_town(own_etcd: EtcdServer) -> AsyncIterator[Town]:
    async for made in town_on(own_etcd):
        yield made


@pytest.mark.parametrize("how", ["revoke", "delete", "garbage", "unknown version", "big"])
async def test_f31_what_an_operator_breaks_is_repaired_by_its_owner(town: Town, how: str) -> None:
    one = await town.member("one")
    directory = await town.directory(relist_s=0.5)
    key, epoch = town.key("one"), one.epoch
    before = await town.operator.get(key)
    assert before is not None
    if how == "revoke":
        await town.operator.revoke(before.lease)
    elif how == "delete":
        assert await town.operator.delete(key)
    else:
        value = {"garbage": b"\xff\x00", "unknown version": b'{"version":7}', "big": b"x" * 1_000_000}[how]
        # Past our own limits, as etcdctl would do it.
        await town.kv.Put(rpc.PutRequest(key=key.encode(), value=value), timeout=5.0)  # type: ignore[attr-defined]
    await until(lambda: one.num_joins == 2)
    assert one.epoch > epoch
    after = await town.operator.get(key)
    assert after is not None
    assert after.value == encode_record(one.record)
    await until(lambda: directory.members["one"].epoch == after.mod_revision)
    assert directory.members["one"].record == one.record
    if how not in ("revoke", "delete"):
        assert sum(directory.view.num_ignored.values()) > 0, "the directory never saw the nonsense"
        assert town.num_left == 0


async def test_f32_a_compaction_while_the_watch_is_cut_leaves_no_ghost(town: Town) -> None:
    await town.member("stays")
    for name in ("ghost", "old"):
        value = encode_record(MemberRecord(member_id=name, incarnation="x", address="127.0.0.1:1"))
        await town.operator.put(town.key(name), value)
    directory = await town.directory()
    await until(lambda: set(town.view) == {"stays", "ghost", "old"})
    await asyncio.to_thread(town.proxy.set, Toxics(refuse=True))
    assert await asyncio.to_thread(town.proxy.cut) > 0
    await town.operator.delete(town.key("ghost"))
    new = encode_record(MemberRecord(member_id="new", incarnation="x", address="127.0.0.1:1"))
    await town.operator.put(town.key("new"), new)
    await town.compact()
    await until(lambda: town.proxy.counts["refused"] > 0)
    assert set(town.view) == {"stays", "ghost", "old"}, "an outage changes nothing"
    await asyncio.to_thread(town.proxy.set, HEALTHY)
    await until(lambda: "new" in town.view and "ghost" not in town.view)
    await until(lambda: set(town.view) == {"stays", "new", "old"})
    assert sum(directory.num_watches_lost.values()) >= 1


async def test_a_route_that_swallows_everything_is_noticed_by_reading_anew(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    directory = await town.directory(relist_s=0.5)
    await asyncio.to_thread(town.proxy.set, Toxics(blackhole=True))
    value = encode_record(MemberRecord(member_id="new", incarnation="x", address="127.0.0.1:1"))
    await town.operator.put(town.key("new"), value)
    await until(lambda: any("going on with the 0 members" in line for line in caplog.messages))
    assert town.proxy.counts["held"] > 0
    assert "new" not in town.view
    await asyncio.to_thread(town.proxy.set, HEALTHY)
    await until(lambda: "new" in town.view)
    assert directory.num_relists > 1


async def test_f29_a_slow_registry_makes_nobody_flap(town: Town) -> None:
    """Each answer comes late, but a renewal fits into the lease: two in three may even fail."""
    one = await town.member("one", ttl_s=2.0)
    await town.directory(relist_s=0.5)
    await asyncio.to_thread(town.proxy.set, Toxics(latency_s=0.1))
    await until(lambda: town.proxy.counts["delayed"] > 60)
    assert one.epoch > 0
    assert one.num_joins == 1
    assert town.num_left == 0


async def test_a_wiped_store_is_filled_again_by_those_who_live(own_town: Town, own_etcd: EtcdServer) -> None:
    town = own_town
    for number in range(20):
        await town.operator.put("/elsewhere/x", str(number).encode())
    one, two = await town.member("one"), await town.member("two")
    directory = await town.directory(relist_s=0.5)
    await until(lambda: len(town.view) == 2)
    before = (await town.operator.list("/elsewhere/")).cluster
    await asyncio.to_thread(own_etcd.kill)
    await asyncio.to_thread(own_etcd.wipe)
    await asyncio.to_thread(own_etcd.start)
    await until(lambda: one.num_joins == 2 and two.num_joins == 2)
    listing = await town.operator.list(member_prefix(town.name, "instances"))
    assert listing.cluster != before, "it is the same store: nothing was wiped"
    assert (await town.operator.list("/elsewhere/")).entries == ()
    assert len(listing.entries) == 2
    await until(lambda: all(m.epoch > 0 for m in directory.members.values()))
    assert set(town.view) == {"one", "two"}


async def test_of_two_leaders_the_cut_off_one_stops_before_the_other_begins(town: Town) -> None:
    one = Leadership(town.registry(), town.name, "roles", "one", ttl_s=TTL_S, clock=SystemClock())
    two = Leadership(town.operator, town.name, "roles", "two", ttl_s=TTL_S, clock=SystemClock())
    one.start()
    await until(lambda: one.epoch() > 0)
    first = one.epoch()
    two.start()
    await asyncio.to_thread(town.proxy.set, Toxics(blackhole=True))
    both = 0
    async with asyncio.timeout(20.0):
        while not two.epoch():
            await asyncio.sleep(0.005)
            both += bool(one.epoch() and two.epoch())
    assert town.proxy.counts["held"] > 0
    assert both == 0
    assert one.epoch() == 0
    assert two.epoch() > first
    await two.close()
    await asyncio.to_thread(town.proxy.set, HEALTHY)
    await one.close()
