"""Puts a whole server together: engine process, front, HTTP. `serve` and `chat` both run this one.

Order matters: the port is opened last, so that whoever can connect is served, and closed first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from xllm.api.server import ApiServer, start_server
from xllm.clock import Clock, SystemClock
from xllm.config import EngineConfig, FrontConfig, ServerConfig
from xllm.config.load import Loaded
from xllm.config.report import StartupReport, sources_lines
from xllm.errors import ConfigError
from xllm.observability.metrics import Metrics
from xllm.service.front import Front
from xllm.service.instances.local import LocalEngine
from xllm.types import ModelCard

SECTIONS = (EngineConfig, FrontConfig, ServerConfig)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests. `base_url` has no trailing slash."""

    base_url: str
    card: ModelCard
    lost: Callable[[], Awaitable[None]]
    """Waits until no engine is left that could serve."""


@asynccontextmanager
async def running(loaded: Loaded, say: Say, clock: Clock | None = None) -> AsyncIterator[Running]:
    """Start everything, yield, then drain and end everything, in the reverse order."""
    clock = clock or SystemClock()
    engine_config, front_config, server_config = (loaded.build(section) for section in SECTIONS)
    if not engine_config.model.model:
        raise ConfigError("name a model, e.g. xllm serve smollm2 (xllm list shows more)")
    report = StartupReport(clock)
    for line in (*loaded.notes, *sources_lines(loaded.values, loaded.sources)):
        say(f"  {line}")
    engine = await LocalEngine.launch(
        engine_config,
        lambda stage, seconds: say(f"  {seconds:7.2f} s  engine: {stage}"),
        timeout_s=front_config.start_timeout_s,
        log_level=server_config.log_level,
    )
    try:
        say(report.stage("engine process"))
        for line in engine.report:
            say(f"    {line}")
        metrics = Metrics()
        front = Front(front_config, None, clock, observer=metrics)
        try:
            await front.add_instance(engine.stream, engine.card, name="engine-0", max_reqs=engine.max_reqs)
            say(report.stage("front: tokenizer and template"))
            server = await start_server(front, server_config, metrics=metrics)
            say(report.stage("HTTP"))
            say(report.total())
            url = base_url(server_config.host, server.port)
            try:
                yield Running(url, engine.card, server, engine)
            finally:
                await front.drain()
                await server.close()
        finally:
            await front.close()
    finally:
        await engine.terminate()


def base_url(host: str, port: int) -> str:
    """An address that a client on this machine can use."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in shown and not shown.startswith("["):
        shown = f"[{shown}]"
    return f"http://{shown}:{port}"
