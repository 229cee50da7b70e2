"""How a process of the command line logs and is watched: the same for serve, service and instance."""

from __future__ import annotations

from xllm.api.metrics import Metrics
from xllm.clock import Clock
from xllm.config import ObservabilityConfig, ServerConfig
from xllm.config.load import Loaded
from xllm.observability.logs import setup_logging
from xllm.observability.otlp import make_tracer
from xllm.service.snapshot import FrontObserver
from xllm.service.watch.desk import WatchDesk


def begin_logging(loaded: Loaded) -> None:
    """Logs of this process go to stderr, in the form and from the severity that the settings name."""
    as_json = loaded.build(ObservabilityConfig).log_format == "json"
    setup_logging(loaded.build(ServerConfig).log_level, as_json=as_json)


def open_desk(loaded: Loaded, clock: Clock, *more: FrontObserver) -> tuple[Metrics, WatchDesk]:
    """What looks at a front: `desk.observer` is for the front, both are for the app. Raises ConfigError."""
    metrics = Metrics()
    tracer = make_tracer(loaded.build(ObservabilityConfig).otlp_endpoint, "xllm-front")
    return metrics, WatchDesk(clock, metrics, *more, tracer=tracer)
