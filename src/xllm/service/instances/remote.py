"""Instances on the network: connects to whoever the directory lists, hands them to the front, connects again.

A connection is the truth. A listed member whose connection is alive stays, even when its record
vanishes; only a newer holder of its name replaces it. Who answers must be who the record says.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from xllm.clock import Clock
from xllm.errors import ConfigError, UnavailableError, XllmError
from xllm.service.instances.about import InstanceAbout
from xllm.service.instances.handshake import attach
from xllm.service.registry.address import Address, parse_address
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.directory import Change, Directory, Member
from xllm.service.registry.record import MemberRecord
from xllm.wire.hello import Identity
from xllm.wire.messages import Hello, Ready
from xllm.wire.stream import EngineStream, connect_tcp

log = logging.getLogger(__name__)

ADD_TIMEOUT_S = 30.0
"""Fetching its text assets included."""

STEADY_S = 5.0
"""A connection that lasted this long was a good one: the next try begins with a short pause again."""


class InstanceHost(Protocol):
    """What is needed of a front."""

    async def add_instance(
        self,
        stream: EngineStream,
        card: Ready,
        *,
        name: str,
        on_lost: Callable[[], None] | None = None,
        about: InstanceAbout | None = None,
    ) -> object: ...

    async def drain_instance(self, name: str, grace_s: float) -> None: ...

    async def remove_instance(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who answered at an address, loaded and ready for requests."""

    stream: EngineStream
    hello: Hello
    ready: Ready


Connect = Callable[[Address, str | None], Awaitable[Peer]]
"""(where, the name that is expected there or None) → who is there. Raises XllmError."""


def tcp_connector(identity: Identity) -> Connect:
    """Connects over TCP as the front `identity`.

    Without a cluster key nobody beyond this machine could prove who it is, so it only connects to this one.
    """

    async def connect(address: Address, peer_id: str | None) -> Peer:
        if not identity.key and not address.is_loopback:
            raise ConfigError(
                "an instance beyond this machine needs cluster_key_file on both sides", code="no_key"
            )
        stream, hello = await connect_tcp(address.host, address.port, identity, peer_id=peer_id)
        try:
            return Peer(stream=stream, hello=hello, ready=await attach(stream))
        except BaseException:
            await stream.close()
            raise

    return connect


class RemoteInstances:
    """`start` once, `close` once. `num_failures` counts refused connections by error code."""

    def __init__(
        self,
        host: InstanceHost,
        directory: Directory,
        connect: Connect,
        clock: Clock,
        *,
        drain_s: float,
        make_backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.num_failures: Counter[str] = Counter()
        self.num_connects = 0
        self._host = host
        self._directory = directory
        self._connect = connect
        self._clock = clock
        self._drain_s = drain_s
        self._make_backoff = make_backoff
        self._keepers: dict[str, _Keeper] = {}
        self._incarnations: dict[str, str] = {}

    @property
    def connected(self) -> tuple[str, ...]:
        """Names of the instances that have a connection now, sorted."""
        return tuple(sorted(self._incarnations.values()))

    def start(self) -> None:
        self._directory.start(self._on_change)

    async def close(self) -> None:
        """Stop looking and connecting. Connections are the front's to close."""
        await self._directory.close()
        keepers, self._keepers = list(self._keepers.values()), {}
        for keeper in keepers:
            keeper.task.cancel()
        await asyncio.gather(*(keeper.task for keeper in keepers), return_exceptions=True)

    def _on_change(self, change: Change) -> None:
        for member in (*change.joined, *change.changed, *change.left):
            name = member.record.member_id
            keeper = self._keepers.get(name)
            if keeper is not None:
                keeper.news.set()
            elif name in self._directory.members:
                keeper = self._keepers[name] = _Keeper()
                keeper.task = asyncio.create_task(self._keep(name, keeper), name=f"remote {name}")

    async def _keep(self, name: str, keeper: _Keeper) -> None:
        backoff = self._make_backoff()
        said: set[str] = set()
        try:
            while (member := self._directory.members.get(name)) is not None:
                keeper.news.clear()
                began_s = self._clock.monotonic_s()
                if member.record.state == "ready":
                    try:
                        await self._serve(member, keeper)
                        said.clear()
                    except (XllmError, OSError, ValueError, TimeoutError) as error:
                        self._failed(name, error, said)
                    except Exception:
                        # A bug of ours: the other instances and later tries must not suffer.
                        log.exception("instance %s: looking after its connection failed", name)
                    if self._clock.monotonic_s() - began_s >= STEADY_S:
                        backoff.reset()
                    pause_s: float | None = backoff.delay_s()
                else:
                    pause_s = None
                await _wait(keeper.news, pause_s)
        finally:
            # In the same step of the loop as the last look at the directory: nobody can have joined between.
            if self._keepers.get(name) is keeper:
                del self._keepers[name]

    async def _serve(self, member: Member, keeper: _Keeper) -> None:
        """One connection from its beginning to its end. Raises what connecting and adding raise."""
        record = member.record
        lost = asyncio.Event()
        expected = record.member_id if record.incarnation else None
        peer = await self._connect(parse_address(record.address), expected)
        incarnation = peer.hello.incarnation
        try:
            self._check(record, peer)
        except XllmError:
            await peer.stream.close()
            raise
        self._incarnations[incarnation] = record.member_id
        try:
            async with asyncio.timeout(ADD_TIMEOUT_S):
                await self._host.add_instance(
                    peer.stream,
                    peer.ready,
                    name=record.member_id,
                    on_lost=lost.set,
                    about=InstanceAbout(
                        pid=peer.ready.pid,
                        incarnation=incarnation,
                        address=record.address,
                        phases=peer.ready.phases,
                        pulses=True,
                        endpoints=peer.ready.endpoints,
                    ),
                )
            self.num_connects += 1
            log.info("instance %s at %s is connected", record.member_id, record.address)
            await self._watch(record, incarnation, keeper, lost)
        finally:
            self._incarnations.pop(incarnation, None)

    async def _watch(
        self, record: MemberRecord, incarnation: str, keeper: _Keeper, lost: asyncio.Event
    ) -> None:
        """Until the connection is lost, or somebody newer has the name."""
        name = record.member_id
        draining: asyncio.Task[None] | None = None
        try:
            while not lost.is_set():
                known = self._directory.members.get(name)
                if known is not None and known.record.incarnation not in ("", incarnation):
                    log.warning("instance %s: a newer process has its name; leaving the old one", name)
                    await self._host.remove_instance(name)
                    return
                if known is not None and known.record.state == "draining" and draining is None:
                    draining = asyncio.create_task(self._host.drain_instance(name, self._drain_s))
                await _first(lost, keeper.news)
                keeper.news.clear()
        finally:
            if draining is not None:
                draining.cancel()
                await asyncio.gather(draining, return_exceptions=True)

    def _check(self, record: MemberRecord, peer: Peer) -> None:
        """Whether who answered is who the record says: ports are reused, and records grow old."""
        hello, card = peer.hello, peer.ready.card
        holder = self._incarnations.get(hello.incarnation)
        if holder is not None:
            raise ConfigError(f"the same process is connected as {holder!r}", code="duplicate_instance")
        if record.incarnation and hello.incarnation != record.incarnation:
            raise UnavailableError("another process answers at its address", code="wrong_incarnation")
        if record.model_ids and card.model_id not in record.model_ids:
            raise ConfigError("it serves another model than its record says", code="wrong_model")
        if record.numerics_class and card.numerics_class != record.numerics_class:
            raise ConfigError("it has another numerics class than its record says", code="wrong_numerics")

    def _failed(self, name: str, error: BaseException, said: set[str]) -> None:
        code = error.code if isinstance(error, XllmError) else type(error).__name__
        self.num_failures[code] += 1
        if code not in said:
            said.add(code)
            log.warning("instance %s cannot be used: %s (%s); trying again", name, error, code)


class _Keeper:
    """The task that looks after one name; `news` = its record has changed or is gone."""

    __slots__ = ("news", "task")

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.news = asyncio.Event()


async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
    """Until the event, at most so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


async def _first(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
