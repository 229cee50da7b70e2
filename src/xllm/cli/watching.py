"""How a process of the command line logs and is watched: the same for serve, service and instance."""

from __future__ import annotations

from xllm.api.metrics import Metrics
from xllm.clock import Clock
from xllm.config import ObservabilityConfig, ServerConfig
from xllm.config.load import Loaded
from xllm.observability.logs import setup_logging
from xllm.observability.otlp import make_tracer
from xllm.service.cluster import ClusterService
from xllm.service.profiler import Profiler
from xllm.service.registry.directory import RegistryDirectory
from xllm.service.snapshot import FrontObserver
from xllm.service.watch.desk import WatchDesk


def begin_logging(loaded: Loaded) -> None:
    """Logs of this process go to stderr, in the form and from the severity that the settings name."""
    as_json = loaded.build(ObservabilityConfig).log_format == "json"
    setup_logging(loaded.build(ServerConfig).log_level, as_json=as_json)


def open_desk(loaded: Loaded, clock: Clock, *more: FrontObserver) -> tuple[Metrics, WatchDesk, Profiler]:
    """What looks at a front: `desk.observer` is for the front, all are for the app. Raises ConfigError."""
    metrics = Metrics()
    tracer = make_tracer(loaded.build(ObservabilityConfig).otlp_endpoint, "xllm-front")
    profiler = Profiler(loaded.build(ObservabilityConfig), clock)
    return metrics, WatchDesk(clock, metrics, *more, tracer=tracer, profile=profiler.front), profiler


def watch_cluster(metrics: Metrics, service: ClusterService) -> None:
    """Export what a front over several machines knows of its registry and of reaching instances."""
    directory, remote = service.directory, service.remote
    metrics.add_gauge("xllm:registry_members", "Instances listed", lambda: len(directory.members))
    metrics.add_counter(
        "xllm:instance_connects", "Connections to instances that were made", lambda: remote.num_connects
    )
    metrics.add_counter(
        "xllm:instance_connect_failures",
        "Tries to connect that failed, or were refused by either side",
        lambda: sum(remote.num_failures.values()),
    )
    # Addresses that stand in the settings are a registry that is always there.
    known = directory if isinstance(directory, RegistryDirectory) else None
    metrics.add_gauge(
        "xllm:registry_up", "1 while the registry answers", lambda: float(known is None or known.reachable)
    )
    metrics.add_counter(
        "xllm:registry_watches_lost",
        "Watches that ended unasked and were followed by a full reading",
        lambda: 0 if known is None else sum(known.num_watches_lost.values()),
    )
    metrics.add_counter(
        "xllm:registry_entries_ignored",
        "Readings of entries that were no valid record",
        lambda: 0 if known is None else sum(known.view.num_ignored.values()),
    )
