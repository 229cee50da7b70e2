"""Remote instances: who is connected, who is refused, and what a lost connection or record means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from tests.null.service.conftest import ASSETS, byte_ids, collect, say, text_of
from xllm.config import FrontConfig
from xllm.errors import ConfigError, UnavailableError
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.instances.remote import Peer, RemoteInstances, tcp_connector
from xllm.service.registry.address import Address, parse_address
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.directory import Change, Member, OnChange, StaticDirectory
from xllm.service.registry.record import MemberRecord
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.testing.instance_thread import null_instance
from xllm.types import SamplingParams
from xllm.wire.hello import FRONT, INSTANCE, Identity
from xllm.wire.messages import Hello, Ready
from xllm.wire.proof import ClusterKey


class ToldDirectory:
    """A directory that says what the test tells it to."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._on_change: OnChange = lambda change: None

    def start(self, on_change: OnChange) -> None:
        self._on_change = on_change

    async def close(self) -> None:
        """Nothing runs."""

    def put(self, record: MemberRecord) -> None:
        name = record.member_id
        known, member = name in self.members, Member(record=record, epoch=len(self.members))
        self.members[name] = member
        self._on_change(Change(changed=(member,)) if known else Change(joined=(member,)))

    def drop(self, name: str) -> None:
        self._on_change(Change(left=(self.members.pop(name),)))


@dataclass
class Host:
    """A process at an address: `engine` is the connection made last."""

    member_id: str
    incarnation: str
    model: str = "sample"
    numerics_class: str | None = None
    engine: SampleEngine | None = None
    num_connects: int = 0


@dataclass
class World:
    front: Front
    directory: ToldDirectory
    remote: RemoteInstances
    hosts: dict[str, Host] = field(default_factory=dict)
    engines: list[SampleEngine] = field(default_factory=list)
    expected: list[str | None] = field(default_factory=list)

    async def connect(self, address: Address, peer_id: str | None) -> Peer:
        host = self.hosts.get(str(address))
        self.expected.append(peer_id)
        if host is None:
            raise UnavailableError("the instance cannot be reached", code="engine_unreachable")
        if peer_id is not None and peer_id != host.member_id:
            raise ConfigError("somebody else is there", code="wrong_peer")
        card = sample_card(ASSETS, model_id=host.model)
        if host.numerics_class:
            card = msgspec.structs.replace(card, numerics_class=host.numerics_class)
        engine = SampleEngine(card, ASSETS, script=say("hello"))
        self.engines.append(engine)
        host.engine = engine
        host.num_connects += 1
        hello = Hello(peer_id=host.member_id, incarnation=host.incarnation, role=INSTANCE)
        return Peer(stream=engine.stream, hello=hello, ready=Ready(card=card, pid=1, max_reqs=8))

    def host(self, member_id: str, port: int, incarnation: str = "i1", **fields: str) -> Host:
        made = Host(member_id, incarnation, **fields)
        self.hosts[f"10.0.0.1:{port}"] = made
        return made

    def names(self) -> set[str]:
        return {i.name for i in self.front.snapshot().instances if i.alive}

    async def ask(self, model: str = "sample") -> str:
        draft = RequestDraft(
            model=model, prompt_token_ids=byte_ids("x"), params=SamplingParams(max_tokens=16)
        )
        return text_of(await collect(await self.front.submit(draft)))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    clock = FakeClock()
    front, directory = Front(FrontConfig(), None, clock), ToldDirectory()

    async def connect(address: Address, peer_id: str | None) -> Peer:
        return await made.connect(address, peer_id)

    remote = RemoteInstances(
        front, directory, connect, clock, drain_s=5.0, make_backoff=lambda: Backoff(0.001, 0.002)
    )
    made = World(front, directory, remote)
    remote.start()
    yield made
    await remote.close()
    await front.close()
    for engine in made.engines:
        await engine.close()
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, left


def record(member_id: str, port: int, incarnation: str = "i1", **fields: object) -> MemberRecord:
    return MemberRecord(
        member_id=member_id,
        incarnation=incarnation,
        address=f"10.0.0.1:{port}",
        **fields,  # type: ignore[arg-type]
    )


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not done():
            await asyncio.sleep(0.001)


async def test_who_is_listed_is_connected_and_serves(world: World) -> None:
    world.host("one", 1)
    world.host("two", 2, "i2", model="other")
    world.directory.put(record("one", 1))
    world.directory.put(record("two", 2, "i2"))
    await until(lambda: world.names() == {"one", "two"})
    assert (await world.ask(), await world.ask("other")) == ("hello", "hello")
    assert world.remote.connected == ("one", "two")
    assert world.front.ready() == (True, "ready")


async def test_an_instance_that_is_listed_before_it_answers_is_tried_again(world: World) -> None:
    world.directory.put(record("one", 1))
    await until(lambda: world.remote.num_failures["engine_unreachable"] >= 3)
    world.host("one", 1)
    await until(lambda: world.names() == {"one"})


async def test_a_lost_connection_is_made_again_while_the_member_is_listed(world: World) -> None:
    host = world.host("one", 1)
    world.directory.put(record("one", 1))
    await until(lambda: world.names() == {"one"})
    assert host.engine is not None
    host.engine.crash()
    await until(lambda: host.num_connects == 2 and world.names() == {"one"})
    assert await world.ask() == "hello"


async def test_a_vanished_record_takes_nobody_away_whose_connection_lives(world: World) -> None:
    host = world.host("one", 1)
    world.directory.put(record("one", 1))
    await until(lambda: world.names() == {"one"})
    world.directory.drop("one")
    await asyncio.sleep(0.01)
    assert await world.ask() == "hello"
    assert host.num_connects == 1
    world.directory.put(record("one", 1))
    await asyncio.sleep(0.01)
    assert host.num_connects == 1, "it is the same process: nothing to connect again"
    world.directory.drop("one")
    assert host.engine is not None
    host.engine.crash()
    await until(lambda: not world.names())
    await until(lambda: not any("remote one" in t.get_name() for t in asyncio.all_tasks()))
    assert host.num_connects == 1, "nobody lists it any more"


async def test_a_newer_holder_of_the_name_replaces_the_old_one(world: World) -> None:
    old = world.host("one", 1, "i1")
    world.directory.put(record("one", 1, "i1"))
    await until(lambda: world.names() == {"one"})
    new = world.host("one", 2, "i2")
    world.directory.put(record("one", 2, "i2"))
    await until(lambda: new.num_connects == 1 and world.names() == {"one"})
    assert old.num_connects == 1
    assert await world.ask() == "hello"
    assert world.remote.connected == ("one",)


@pytest.mark.parametrize(
    ("host", "listed", "code"),
    [
        ({"incarnation": "i2"}, {}, "wrong_incarnation"),
        ({"member_id": "two"}, {}, "wrong_peer"),
        ({}, {"model_ids": ("another",)}, "wrong_model"),
        ({}, {"numerics_class": "another"}, "wrong_numerics"),
    ],
)
async def test_who_answers_must_be_who_the_record_says(
    world: World, host: dict[str, str], listed: dict[str, object], code: str
) -> None:
    """F62: a reused port, a clone, a record of another life."""
    world.host(**{"member_id": "one", "port": 1, **host})  # type: ignore[arg-type]
    world.directory.put(record("one", 1, **listed))  # type: ignore[arg-type]
    await until(lambda: world.remote.num_failures[code] >= 2)
    assert world.names() == set()
    assert not world.front.ready()[0]
    # It is tried again, and used once the record is right.
    there = world.hosts["10.0.0.1:1"]
    world.directory.put(record(there.member_id, 1, there.incarnation))
    await until(lambda: world.names() == {there.member_id})


async def test_one_process_under_two_names_is_connected_once(world: World) -> None:
    world.host("", 1)
    world.hosts["10.0.0.1:2"] = world.hosts["10.0.0.1:1"]
    world.directory.put(record("a", 1, ""))
    await until(lambda: world.names() == {"a"})
    world.directory.put(record("b", 2, ""))
    await until(lambda: world.remote.num_failures["duplicate_instance"] >= 2)
    assert world.names() == {"a"}
    assert world.expected[0] is None, "of a fixed address nobody knows who should be there"


async def test_a_draining_member_gets_nothing_new_and_is_not_connected_again(world: World) -> None:
    host = world.host("one", 1)
    world.directory.put(record("one", 1))
    await until(lambda: world.names() == {"one"})
    world.directory.put(record("one", 1, state="draining"))
    await until(lambda: not world.front.ready()[0])
    with pytest.raises(UnavailableError):
        await world.ask()
    assert host.engine is not None
    host.engine.crash()
    await until(lambda: not world.names())
    await asyncio.sleep(0.02)
    assert host.num_connects == 1
    world.directory.put(record("one", 1, "i1", state="ready"))
    await until(lambda: world.names() == {"one"})


async def test_flapping_members_lose_nobody_elses_requests(world: World) -> None:
    """F58: one comes and goes all the time, with and without its record; the steady one serves."""
    world.host("steady", 1)
    flapping = world.host("flapping", 2, "i2")
    world.directory.put(record("steady", 1))
    await until(lambda: "steady" in world.names())
    answers = []
    num_crashed = 0
    for number in range(20):
        world.directory.put(record("flapping", 2, "i2"))
        # Later than the one that crashed: while the answers came it may have connected again already.
        await until(lambda: flapping.num_connects > num_crashed and "flapping" in world.names())  # noqa: B023
        asked = [asyncio.create_task(world.ask()) for _ in range(4)]
        if number % 2:
            world.directory.drop("flapping")
        num_crashed = flapping.num_connects
        assert flapping.engine is not None
        flapping.engine.crash()
        answers += await asyncio.gather(*asked)
    assert answers == ["hello"] * 80
    assert flapping.num_connects >= 20, "it hardly flapped"


# -- over real sockets ------------------------------------------------------------------------------------


async def test_over_tcp_with_the_key_and_not_without(world: World) -> None:
    key = ClusterKey(b"k" * 32)
    server = await asyncio.to_thread(null_instance, identity=Identity(role=INSTANCE, peer_id="one", key=key))
    try:
        address = Address(*server.address)
        peer = await tcp_connector(Identity(role=FRONT, key=key))(address, "one")
        assert peer.hello.incarnation == server.identity.incarnation
        assert peer.ready.max_reqs
        await peer.stream.close()
        with pytest.raises(ConfigError):
            await tcp_connector(Identity(role=FRONT, key=key))(address, "two")
        with pytest.raises((ConfigError, UnavailableError)) as refused:
            await tcp_connector(Identity(role=FRONT))(address, "one")
        assert refused.value.code == "cluster_key"
    finally:
        server.stop()
        assert await asyncio.to_thread(server.wait, 10.0) == 0


async def test_without_a_key_no_other_machine_is_connected_to() -> None:
    connect = tcp_connector(Identity(role=FRONT))
    for text in ("192.0.2.1:4000", "example.invalid:4000", "0.0.0.0:4000"):
        with pytest.raises(ConfigError) as refused:
            await connect(parse_address(text), None)
        assert refused.value.code == "no_key"


async def test_a_fixed_address_with_nobody_there_is_tried_until_closed() -> None:
    clock = FakeClock()
    front = Front(FrontConfig(), None, clock)
    remote = RemoteInstances(
        front,
        StaticDirectory([Address("127.0.0.1", 9)]),
        tcp_connector(Identity(role=FRONT)),
        clock,
        drain_s=1.0,
        make_backoff=lambda: Backoff(0.001, 0.002),
    )
    remote.start()
    await until(lambda: remote.num_failures["engine_unreachable"] >= 2)
    assert front.ready() == (False, "loading")
    await remote.close()
    await front.close()
