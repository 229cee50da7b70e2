"""`xllm instance MODEL`: one engine that listens for fronts and, with a registry, tells them where it is.

Loads first, then listens, then registers: whoever finds it can use it. SIGTERM drains: its record
says so first and is taken back last. Which requests it gets is the fronts' matter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import threading
from dataclasses import replace

from xllm.cli.settings import add_settings, load_settings
from xllm.cli.signals import until_signal
from xllm.cli.watching import begin_logging
from xllm.clock import Clock, SystemClock
from xllm.config import ClusterConfig, EngineConfig, FrontConfig, ServerConfig, env
from xllm.config.fields import settings
from xllm.config.load import Loaded
from xllm.config.report import sources_lines
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.kvtransfer.opening import pages_for_peers
from xllm.engine.platform.host import bind_to_cpus
from xllm.engine.server import InstanceServer
from xllm.engine.time_slice import ask_long_slice, ask_usual_slice
from xllm.errors import ConfigError
from xllm.heap import settle
from xllm.observability.logs import say
from xllm.service.registry.address import RegistryAddress, is_id, parse_registry
from xllm.service.registry.advertise import advertised
from xllm.service.registry.membership import Membership
from xllm.service.registry.open import open_registry
from xllm.service.registry.record import MemberRecord
from xllm.version import __version__
from xllm.wire.hello import INSTANCE, Identity, listen_address
from xllm.wire.messages import WIRE_VERSION

SECTIONS = (EngineConfig, FrontConfig, ClusterConfig, ServerConfig)

NOT_OURS = frozenset(settings(FrontConfig, ServerConfig)) - {"shutdown_timeout_s", "log_level"} | {
    "instances"
}
"""Settings of other commands in the same sections: accepted in a shared file, no flag here."""

DRAINING = "draining: running answers may end, nothing new is accepted"

ANNOUNCE_S = 1.0
"""For telling the registry before draining begins; connected fronts are told by the engine anyway."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *SECTIONS, skip=NOT_OURS)


def run(args: argparse.Namespace) -> int:
    loaded = load_settings(args, *SECTIONS)
    begin_logging(loaded)
    config, cluster = loaded.build(EngineConfig), loaded.build(ClusterConfig)
    if not config.model.model:
        raise ConfigError("name a model, e.g. xllm instance smollm2 (xllm list shows more)")
    where = parse_registry(cluster.registry)
    if where.kind == "static":
        raise ConfigError("registry=static://… is for xllm service; an instance needs etcd://… or none")
    for name in filter(None, (cluster.instance_id, cluster.cluster)):
        if not is_id(name):
            raise ConfigError(f"{name!r} is no name: use letters, digits, '.', '_' and '-', at most 64")
    # All that can be refused is refused before minutes go into loading.
    identity = Identity.of(cluster, INSTANCE)
    listen_address(cluster, identity.key)
    say(f"xLLM {__version__}: starting an instance")
    for line in (*loaded.notes, *sources_lines(loaded.values, loaded.sources)):
        say(f"  {line}")
    engine = _load(config)
    grace_s = loaded.build(FrontConfig).shutdown_timeout_s
    server = InstanceServer(engine, config, cluster, identity=identity, grace_s=grace_s)
    return asyncio.run(until_signal(lambda stop: _serve(stop, loaded, server, where), say))


def _load(config: EngineConfig) -> BuiltEngine:
    env.become_engine()
    clock = SystemClock()
    bound = bind_to_cpus(config.platform.cpus)
    ask_long_slice()  # for the kernels' threads, which are made here
    engine = build_engine(
        config,
        clock,
        lambda stage, seconds: say(f"  {seconds:7.2f} s  {stage}"),
        shared=pages_for_peers(config.transfer),
    )
    ask_usual_slice()
    settle()
    report = engine.report if bound is None else (bound, *engine.report)
    for line in report:
        say(f"    {line}")
    return replace(engine, report=report)


async def _serve(stop: asyncio.Event, loaded: Loaded, server: InstanceServer, where: RegistryAddress) -> int:
    cluster = loaded.build(ClusterConfig)
    server.start()
    ended = _ended_event(server)
    try:
        if where.kind == "embedded":
            say("no registry: give this address to xllm service --registry static://…")
            say(f"ready: {advertised(cluster, server.address, ())}")
            await _first(stop, ended)
            say(DRAINING)
            server.drain()
            await ended.wait()
        else:
            await _serve_registered(stop, ended, cluster, server, where, SystemClock())
    finally:
        server.stop()
        # The step that runs is not waited for: it may be what hangs, and the process ends anyway.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), 2.0)
    say("stopped")
    return server.wait(0.0) or 0


async def _serve_registered(
    stop: asyncio.Event,
    ended: asyncio.Event,
    cluster: ClusterConfig,
    server: InstanceServer,
    where: RegistryAddress,
    clock: Clock,
) -> None:
    """From registration to the lease's end; raises ConfigError when a live member has our name."""
    registry = open_registry(where, clock, ttl_s=cluster.lease_ttl_s)
    address = advertised(cluster, server.address, where.endpoints)
    membership = Membership(
        registry,
        cluster.cluster,
        "instances",
        _record(server, address, clock),
        ttl_s=cluster.lease_ttl_s,
        clock=clock,
    )
    try:
        membership.start()
        say(f"ready: {address}")
        joining = asyncio.create_task(membership.join())
        await _first(stop, ended, joining)
        if joining.done():
            joining.result()
            say(f"registered as {membership.record.member_id}")
            await _first(stop, ended)
        joining.cancel()
        say(DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANNOUNCE_S):
                await membership.announce("draining")
        server.drain()
        await ended.wait()
    finally:
        await membership.leave()
        await registry.close()


def _record(server: InstanceServer, address: str, clock: Clock) -> MemberRecord:
    card = server.ready.card
    return MemberRecord(
        member_id=server.identity.peer_id,
        incarnation=server.identity.incarnation,
        address=address,
        phases=server.ready.phases,
        wire_version=WIRE_VERSION,
        model_ids=(card.model_id,),
        numerics_class=card.numerics_class,
        pid=os.getpid(),
        started_s=clock.wall_s(),
    )


def _ended_event(server: InstanceServer) -> asyncio.Event:
    """Set when the step thread has ended. A thread of its own: nothing at exit waits for a daemon."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def watch() -> None:
        server.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch, name="engine-end", daemon=True).start()
    return ended


async def _first(*awaited: asyncio.Event | asyncio.Task[None]) -> None:
    waiting = [a if isinstance(a, asyncio.Task) else asyncio.create_task(_set(a)) for a in awaited]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task, source in zip(waiting, awaited, strict=True):
        if task is not source:
            task.cancel()


async def _set(event: asyncio.Event) -> None:
    await event.wait()
