"""Puts a whole server together: engine processes, front, HTTP. `serve` and `chat` both run this one.

Order matters: the port is opened last, so that whoever can connect is served, and closed first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from xllm.api.app import create_app
from xllm.api.server import HttpServer
from xllm.cli.room import with_room
from xllm.cli.watching import open_desk
from xllm.clock import Clock, SystemClock
from xllm.config import ClusterConfig, EngineConfig, FrontConfig, ServerConfig
from xllm.config.instances import parse_instances, roles_of
from xllm.config.load import Loaded
from xllm.config.report import StartupReport, sources_lines
from xllm.errors import ConfigError
from xllm.ids import new_request_id
from xllm.service.instances.local import LocalEngine
from xllm.service.local import LocalService
from xllm.service.usage import UsageRecorder
from xllm.service.usage.open import open_usage_store
from xllm.types import ModelCard

SECTIONS = (EngineConfig, FrontConfig, ClusterConfig, ServerConfig)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests. `base_url` has no trailing slash."""

    base_url: str
    card: ModelCard
    service: LocalService
    http: HttpServer


@asynccontextmanager
async def running(loaded: Loaded, say: Say, clock: Clock | None = None) -> AsyncIterator[Running]:
    """Start everything, yield, then drain and end everything in the reverse order."""
    clock = clock or SystemClock()
    loaded, why_memory = with_room(loaded)
    engine_config, front_config, server_config = (
        loaded.build(EngineConfig),
        loaded.build(FrontConfig),
        loaded.build(ServerConfig),
    )
    cluster_config = loaded.build(ClusterConfig)
    roles = roles_of(parse_instances(cluster_config.instances))
    if cluster_config.registry != ClusterConfig().registry:
        raise ConfigError(
            "xllm serve starts its own engines and asks no registry; use xllm instance for engines and "
            "xllm service for the front",
            param="registry",
        )
    if not engine_config.model.model:
        raise ConfigError("name a model, e.g. xllm serve smollm2 (xllm list shows more)")
    for line in (*loaded.notes, *sources_lines(loaded.values, loaded.sources)):
        say(f"  {line}")
    say(f"  {why_memory}")
    report = StartupReport(clock)
    usage = open_usage_store(server_config.usage_db)
    recorder = UsageRecorder(usage, clock, front_id=new_request_id())
    metrics, desk, profiler = open_desk(loaded, clock, recorder)
    service = await LocalService.start(
        [engine_config] * len(roles),
        front_config,
        clock,
        on_progress=lambda name, stage, seconds: say(f"  {seconds:7.2f} s  {name}: {stage}"),
        on_up=_Introductions(say),
        observer=desk.observer,
        log_level=server_config.log_level,
        roles=roles,
    )
    try:
        engine, *_ = service.engines
        say(report.stage("first engine and front together"))
        app = create_app(
            service.front,
            server_config,
            clock=clock,
            metrics=metrics,
            desk=desk,
            usage=usage,
            profiler=profiler,
        )
        server = HttpServer(app, server_config)
        await server.start()
        say(report.stage("HTTP"))
        say(report.total())
        try:
            yield Running(
                base_url(server_config.host, server.port, tls=bool(server_config.ssl_certfile)),
                engine.card,
                service,
                server,
            )
        finally:
            await server.drain(service.front, front_config.shutdown_timeout_s)
    finally:
        await service.close()
        desk.close()
        await usage.close()


class _Introductions:
    """Tells of each engine that comes up, and of its choices only what the one before did not say."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._said: frozenset[str] = frozenset()

    def __call__(self, name: str, engine: LocalEngine) -> None:
        self._say(f"  {name} takes requests (process {engine.pid})")
        for line in engine.report:
            if line not in self._said:
                self._say(f"    {line}")
        self._said = frozenset(engine.report)


def base_url(host: str, port: int, *, tls: bool = False) -> str:
    """An address that a client on this machine can use."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{shown}]:{port}" if ":" in shown else f"{scheme}://{shown}:{port}"
