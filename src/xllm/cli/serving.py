"""Puts a whole server together: engine process, front, HTTP. `serve` and `chat` both run this one.

Order matters: the port is opened last, so that whoever can connect is served, and closed first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from xllm.api.app import create_app
from xllm.api.metrics import Metrics
from xllm.api.server import HttpServer
from xllm.clock import Clock, SystemClock
from xllm.config import ClusterConfig, EngineConfig, FrontConfig, ObservabilityConfig, ServerConfig
from xllm.config.load import Loaded
from xllm.config.report import StartupReport, sources_lines
from xllm.errors import ConfigError
from xllm.ids import new_request_id
from xllm.observability.otlp import make_tracer
from xllm.service.local import LocalService
from xllm.service.usage import UsageRecorder
from xllm.service.usage.open import open_usage_store
from xllm.service.watch.desk import WatchDesk
from xllm.types import ModelCard

SECTIONS = (EngineConfig, FrontConfig, ClusterConfig, ServerConfig)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests. `base_url` has no trailing slash."""

    base_url: str
    card: ModelCard
    service: LocalService


@asynccontextmanager
async def running(loaded: Loaded, say: Say, clock: Clock | None = None) -> AsyncIterator[Running]:
    """Start everything, yield, then drain and end everything in the reverse order."""
    clock = clock or SystemClock()
    engine_config, front_config, server_config = (
        loaded.build(EngineConfig),
        loaded.build(FrontConfig),
        loaded.build(ServerConfig),
    )
    if not engine_config.model.model:
        raise ConfigError("name a model, e.g. xllm serve smollm2 (xllm list shows more)")
    for line in (*loaded.notes, *sources_lines(loaded.values, loaded.sources)):
        say(f"  {line}")
    report = StartupReport(clock)
    metrics = Metrics()
    tracer = make_tracer(loaded.build(ObservabilityConfig).otlp_endpoint, "xllm-front")
    usage = open_usage_store(server_config.usage_db)
    recorder = UsageRecorder(usage, clock, front_id=new_request_id())
    desk = WatchDesk(clock, metrics, recorder, tracer=tracer)
    service = await LocalService.start(
        [engine_config],
        front_config,
        clock,
        on_progress=lambda stage, seconds: say(f"  {seconds:7.2f} s  engine: {stage}"),
        observer=desk.observer,
        log_level=server_config.log_level,
    )
    try:
        (engine,) = service.engines
        say(report.stage("engine and front together"))
        for line in engine.report:
            say(f"    {line}")
        app = create_app(service.front, server_config, clock=clock, metrics=metrics, desk=desk, usage=usage)
        server = HttpServer(app, server_config)
        await server.start()
        say(report.stage("HTTP"))
        say(report.total())
        try:
            yield Running(
                base_url(server_config.host, server.port, tls=bool(server_config.ssl_certfile)),
                engine.card,
                service,
            )
        finally:
            await server.drain(service.front, front_config.shutdown_timeout_s)
    finally:
        await service.close()
        desk.close()
        await usage.close()


def base_url(host: str, port: int, *, tls: bool = False) -> str:
    """An address that a client on this machine can use."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{shown}]:{port}" if ":" in shown else f"{scheme}://{shown}:{port}"
