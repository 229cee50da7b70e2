"""Metrics that are read from the front's snapshot when somebody asks, not observed as they happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.service.snapshot import FrontSnapshot, InstanceSnapshot
from xllm.types import EngineSnapshot, ModelCard


class Readable(Protocol):
    """The part of the front that is read on a scrape."""

    def snapshot(self) -> FrontSnapshot: ...

    def models(self) -> list[ModelCard]: ...


_LABELS = ("model_name", "engine")
_Rows = tuple[tuple[str, str, Callable[[EngineSnapshot], float]], ...]

_GAUGES: _Rows = (
    ("vllm:num_requests_running", "Requests in the batch", lambda e: e.num_running),
    ("vllm:num_requests_waiting", "Requests in the engine's queue", lambda e: e.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV pages owned by requests, 0 to 1",
        lambda e: e.owned_pages / e.total_pages if e.total_pages else 0.0,
    ),
    ("xllm:owned_pages", "KV pages owned by requests", lambda e: e.owned_pages),
    ("xllm:cached_pages", "KV pages kept for reuse", lambda e: e.cached_pages),
    ("xllm:free_pages", "KV pages without content", lambda e: e.free_pages),
    ("xllm:program_arena_bytes", "Memory of recorded programs", lambda e: e.program_arena_bytes),
    ("xllm:kv_map_mappings", "Mappings of KV pages, at most", lambda e: e.kv_mappings),
    ("xllm:last_step_seconds", "Duration of the last step", lambda e: e.last_step_ms / 1000),
    ("xllm:backlog_tokens", "Prompt rows accepted and not computed yet", lambda e: e.backlog_tokens),
    ("xllm:decoding_sequences", "Sequences that draw a token in every step", lambda e: e.num_decoding),
    ("xllm:decode_context_tokens", "Tokens that those stand on", lambda e: e.decode_context),
    ("xllm:cost_error_ratio", "Error of the fitted step times", lambda e: e.cost_error),
)

_COUNTERS: _Rows = (
    ("vllm:num_preemptions", "Preempted sequences", lambda e: e.num_preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda e: e.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda e: e.prefix_hits),
    ("vllm:prompt_tokens", "Prompt tokens processed", lambda e: e.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated", lambda e: e.generation_tokens),
    ("xllm:engine_steps", "Steps run", lambda e: e.step),
    ("xllm:step_gaps", "Steps that followed another one while there was work", lambda e: e.num_step_gaps),
    (
        "xllm:step_gap_seconds",
        "Time for which the device idled between such steps",
        lambda e: e.step_gaps_ms / 1000,
    ),
    ("xllm:program_captures", "Programs made, one for each shape bucket", lambda e: e.program_captures),
    ("xllm:program_replays", "Programs run", lambda e: e.program_replays),
    ("xllm:kv_map_mapped_pages", "KV pages mapped into a space", lambda e: e.kv_maps),
    ("xllm:kv_map_kept_pages", "KV pages found where they were wanted", lambda e: e.kv_kept_pages),
    ("xllm:kv_map_placed_pages", "KV pages that had to be mapped", lambda e: e.kv_placed_pages),
    ("xllm:kv_map_unmapped_spaces", "Spaces unmapped at the limit", lambda e: e.kv_unmaps),
    ("xllm:kv_map_contiguous_parts", "Sequences' steps read in one piece", lambda e: e.kv_contiguous),
    ("xllm:kv_map_late_parts", "Sequences' steps before all was mapped", lambda e: e.kv_late),
    ("xllm:kv_map_late_decodes", "Of these, steps of one row", lambda e: e.kv_late_decodes),
    ("xllm:eager_steps", "Steps beyond every bucket", lambda e: e.num_eager_steps),
    ("xllm:engine_requests_accepted", "Requests the engine accepted", lambda e: e.num_accepted),
    ("xllm:engine_requests_ended", "Requests the engine ended", lambda e: e.num_ended),
    ("xllm:wire_dropped_peers", "Connections the engine refused or cut off", lambda e: e.num_dropped_peers),
    (
        "xllm:wire_skipped_messages",
        "Messages that the engine did not understand",
        lambda e: e.num_skipped_messages,
    ),
)

_INSTANCE_GAUGES: tuple[tuple[str, str, Callable[[InstanceSnapshot], float]], ...] = (
    ("xllm:instance_up", "1 while the instance is connected", lambda i: float(i.alive)),
    ("xllm:instance_ready", "1 while it gets requests", lambda i: float(i.state == "ready")),
    ("xllm:instance_requests", "Requests of this front on it", lambda i: i.num_requests),
    ("xllm:instance_quiet_seconds", "Since its last sign of progress", lambda i: i.quiet_s),
    ("xllm:kv_index_pages", "Pages that the front knows it holds", lambda i: i.num_indexed_pages),
    ("xllm:instance_restarts", "Times it was started again", lambda i: i.about.num_restarts),
)

_FRONT_GAUGES: tuple[tuple[str, str, Callable[[FrontSnapshot], float]], ...] = (
    ("xllm:inflight_requests", "Accepted, not ended", lambda s: s.num_inflight_reqs),
    ("xllm:inflight_tokens", "Their prompt tokens", lambda s: s.num_inflight_tokens),
    ("xllm:requests_without_instance", "Accepted, and waiting for an instance", lambda s: s.num_waiting),
    ("xllm:requests_moving", "Being handed over to another instance", lambda s: s.num_moving),
)

_FRONT_COUNTERS: tuple[tuple[str, str, Callable[[FrontSnapshot], float]], ...] = (
    ("xllm:requests_accepted", "Accepted requests", lambda s: s.num_accepted),
    ("xllm:divergences", "Replayed tokens that differed", lambda s: s.num_divergences),
    ("xllm:stale_frames", "Frames of old attempts", lambda s: s.num_stale_frames),
    ("xllm:instance_suspicions", "Times an instance was suspected", lambda s: s.num_suspicions),
    ("xllm:kv_index_gaps", "Gaps in what instances told of their pages", lambda s: s.num_kv_gaps),
    ("xllm:prefix_fetches", "Prefixes fetched from a peer", lambda s: s.num_prefix_fetches),
    ("xllm:requests_quarantined", "Requests that engines died of", lambda s: s.num_quarantined),
    (
        "xllm:nonexact_resume",
        "Requests that went on in another numerics class",
        lambda s: s.num_nonexact_resumes,
    ),
)

_BY_CAUSE: tuple[tuple[str, str, Callable[[FrontSnapshot], Mapping[str, int]]], ...] = (
    ("xllm:requests_moved", "Requests taken off an instance", lambda s: s.num_moves),
    ("xllm:instance_deaths", "Instances lost unasked", lambda s: s.num_deaths),
)


class SnapshotCollector(Collector):
    """`front` None = nothing to tell yet. `gauges` and `counters` (name → help, value) are kept by others."""

    def __init__(self) -> None:
        self.front: Readable | None = None
        self.num_tasks = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self.counters: dict[str, tuple[str, Callable[[], float]]] = {}

    def collect(self) -> Iterator[Metric]:
        if self.front is None:
            return
        snapshot = self.front.snapshot()
        yield from _of_instances(snapshot.instances)
        yield from _of_front(snapshot)
        yield from _of_roles(snapshot)
        yield GaugeMetricFamily("xllm:front_tasks", "Tasks of the front's event loop", self.num_tasks)
        for name, (help, value) in self.gauges.items():
            yield GaugeMetricFamily(name, help, value())
        for name, (help, value) in self.counters.items():
            yield CounterMetricFamily(name, help, value())
        yield _cache_config(self.front.models())


def _of_instances(instances: tuple[InstanceSnapshot, ...]) -> Iterator[Metric]:
    for name, help, read in _GAUGES:
        yield _family(GaugeMetricFamily(name, help, labels=_LABELS), instances, read)
    for name, help, read in _COUNTERS:
        yield _family(CounterMetricFamily(name, help, labels=_LABELS), instances, read)
    for name, help, look in _INSTANCE_GAUGES:
        family = GaugeMetricFamily(name, help, labels=_LABELS)
        for i in instances:
            family.add_metric((i.model_id, i.name), float(look(i)))
        yield family


def _of_front(snapshot: FrontSnapshot) -> Iterator[Metric]:
    for name, help, read in _FRONT_GAUGES:
        yield GaugeMetricFamily(name, help, read(snapshot))
    for name, help, read in _FRONT_COUNTERS:
        yield CounterMetricFamily(name, help, read(snapshot))
    for name, help, split in _BY_CAUSE:
        family = CounterMetricFamily(name, help, labels=("cause",))
        for cause, count in sorted(split(snapshot).items()):
            family.add_metric((cause,), count)
        yield family
    failures = CounterMetricFamily(
        "xllm:kv_transfer_failures", "Moves that did not come about", labels=("code",)
    )
    for code, count in sorted(snapshot.num_transfer_failures.items()):
        failures.add_metric((code,), count)
    yield failures
    moves = CounterMetricFamily(
        "xllm:handovers", "Requests that were to take their pages along", labels=("reason", "outcome")
    )
    for (reason, outcome), count in sorted(snapshot.num_handovers.items()):
        moves.add_metric((reason, outcome), count)
    yield moves


def _of_roles(snapshot: FrontSnapshot) -> Iterator[Metric]:
    pools = GaugeMetricFamily("xllm:pool_size", "Instances by role and transition", labels=("pool",))
    sizes = Counter(i.standing.pool for i in snapshot.instances if i.alive)
    for pool, size in sorted(sizes.items()):
        pools.add_metric((pool,), size)
    yield pools
    switches = CounterMetricFamily(
        "xllm:role_switches", "Changes of an instance's role", labels=("from", "to", "reason")
    )
    for labels, count in sorted(snapshot.num_role_switches.items()):
        switches.add_metric(labels, count)
    yield switches


_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)


def _family(
    family: _Family, instances: Iterable[InstanceSnapshot], read: Callable[[EngineSnapshot], float]
) -> _Family:
    for i in instances:
        family.add_metric((i.model_id, i.name), float(read(i.engine)))
    return family


def _cache_config(cards: Iterable[ModelCard]) -> Metric:
    labels = ("model_name", "block_size", "num_gpu_blocks", "cache_dtype")
    info = GaugeMetricFamily("vllm:cache_config_info", "KV cache of each model", labels=labels)
    for card in cards:
        info.add_metric((card.model_id, str(card.page_size), str(card.num_pages), card.dtype), 1.0)
    return info
