"""`xllm service`: a front without engines of its own; instances elsewhere are found by a registry.

Starts at once and serves nothing until an instance is there; instances may come and go, and be of
different models. The first signal drains, a second one stops at once.
"""

from __future__ import annotations

import argparse
import asyncio

from xllm.api.app import create_app
from xllm.api.server import HttpServer
from xllm.cli.serving import base_url
from xllm.cli.settings import add_settings, load_settings
from xllm.cli.signals import until_signal
from xllm.cli.watching import begin_logging, open_desk, watch_cluster
from xllm.clock import SystemClock
from xllm.config import ClusterConfig, FrontConfig, ObservabilityConfig, ServerConfig
from xllm.config.load import Loaded
from xllm.config.report import sources_lines
from xllm.heap import settle
from xllm.ids import new_request_id
from xllm.observability.logs import say
from xllm.service.cluster import ClusterService
from xllm.service.registry.address import Address
from xllm.service.usage import UsageRecorder
from xllm.service.usage.open import open_usage_store
from xllm.version import __version__

SECTIONS = (FrontConfig, ClusterConfig, ServerConfig, ObservabilityConfig)

NOT_OURS = frozenset({"instances", "listen", "role"})
"""Settings of other commands in the same sections: accepted in a shared file, no flag here."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *SECTIONS, model=False, skip=NOT_OURS)


def run(args: argparse.Namespace) -> int:
    loaded = load_settings(args, *SECTIONS)
    begin_logging(loaded)
    return asyncio.run(until_signal(lambda stop: _serve(stop, loaded), say))


async def _serve(stop: asyncio.Event, loaded: Loaded) -> int:
    say(f"xLLM {__version__}: starting the service")
    for line in (*loaded.notes, *sources_lines(loaded.values, loaded.sources)):
        say(f"  {line}")
    front_config, server_config = loaded.build(FrontConfig), loaded.build(ServerConfig)
    clock = SystemClock()
    usage = open_usage_store(server_config.usage_db)
    recorder = UsageRecorder(usage, clock, front_id=new_request_id())
    metrics, desk, profiler = open_desk(loaded, clock, recorder)
    service = ClusterService(front_config, loaded.build(ClusterConfig), clock, observer=desk.observer)
    watch_cluster(metrics, service)
    try:
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
        try:
            service.start()
            service.register(str(Address(server_config.host, server.port)))
            settle()
            say("waiting for instances; /ready tells when requests can be served")
            tls = server_config.ssl_certfile is not None
            say(f"ready: {base_url(server_config.host, server.port, tls=tls)}")
            await stop.wait()
            say("draining: running answers may end, nothing new is accepted")
        finally:
            await server.drain(service.front, front_config.shutdown_timeout_s)
    finally:
        await service.close()
        desk.close()
        await usage.close()
    say("stopped")
    return 0
