"""What is counted, under vLLM's names where it has one and `xllm:*` where it has not.

One registry per server. Gauges and engine counters are read from the front's snapshot when somebody
asks; only durations are observed as they happen. Labels come from closed sets: routes, statuses,
served models, finish reasons. Nothing a client sends becomes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.observability.buckets import LATENCY_S, LENGTH, TOKEN_S, TTFT_S
from xllm.service.snapshot import FrontSnapshot, InstanceSnapshot, NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.types import EngineSnapshot, FinishReason, ModelCard

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REASONS = frozenset(r.value for r in FinishReason)


class Readable(Protocol):
    """The part of the front that is read on a scrape."""

    def snapshot(self) -> FrontSnapshot: ...

    def models(self) -> list[ModelCard]: ...


class Metrics(NullObserver):
    """A `FrontObserver` that also counts responses and renders everything."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._source = _SnapshotCollector()
        self._registry.register(self._source)
        by_model = ("model_name",)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, by_model, registry=self._registry, buckets=buckets)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Submission to first output", TTFT_S)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between outputs of a request", TOKEN_S)
        self._itl_of: dict[str, Histogram] = {}
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean after the first", TOKEN_S)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Submission to end", LATENCY_S)
        self._queue = histogram("vllm:request_queue_time_seconds", "Waiting in the engine", LATENCY_S)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From the queue to output", LATENCY_S)
        self._decode = histogram("vllm:request_decode_time_seconds", "First output to the end", LATENCY_S)
        self._inference = histogram("vllm:request_inference_time_seconds", "End of queue to end", LATENCY_S)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens", LENGTH)
        self._generation = histogram("vllm:request_generation_tokens", "Output tokens", LENGTH)
        self._success = Counter(
            "vllm:request_success",
            "Ended requests by finish reason",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._aborted = Counter(
            "xllm:requests_aborted", "Requests whose client left", by_model, registry=self._registry
        )
        self._responses = Counter(
            "xllm:http_responses", "HTTP responses", ("route", "status"), registry=self._registry
        )

    # -- FrontObserver --------------------------------------------------------------------------

    def on_delta(self, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        if first:
            self._ttft.labels(model).observe(gap_s)
            return
        # Once a token: the look-up by labels costs as much as the observation.
        child = self._itl_of.get(model)
        if child is None:
            child = self._itl_of[model] = self._itl.labels(model)
        child.observe(gap_s)

    def on_ended(self, record: RequestRecord) -> None:
        model, tokens = record.model, record.usage.completion_tokens
        aborted = record.outcome == "aborted"
        reason = "abort" if aborted else record.outcome if record.outcome in _REASONS else "error"
        self._success.labels(model, reason).inc()
        if aborted:
            self._aborted.labels(model).inc()
        self._e2e.labels(model).observe(record.e2e_s)
        self._queue.labels(model).observe(record.queue_s)
        self._prompt.labels(model).observe(record.usage.prompt_tokens)
        self._generation.labels(model).observe(tokens)
        self._inference.labels(model).observe(max(0.0, record.e2e_s - record.queue_s))
        if record.ttft_s is not None:
            decode_s = max(0.0, record.e2e_s - record.ttft_s)
            self._prefill.labels(model).observe(max(0.0, record.ttft_s - record.queue_s))
            self._decode.labels(model).observe(decode_s)
            if tokens > 1:
                self._tpot.labels(model).observe(decode_s / (tokens - 1))

    # -- HTTP -------------------------------------------------------------------------------------

    def on_response(self, route: str, status: int) -> None:
        """`route` is a label of the route table, never a path."""
        self._responses.labels(route, str(status)).inc()

    def render(self, front: Readable, *, num_tasks: int) -> bytes:
        """The exposition text; `num_tasks` are the tasks of the front's event loop."""
        self._source.front = front
        self._source.num_tasks = num_tasks
        return generate_latest(self._registry)


_GAUGES: tuple[tuple[str, str, Callable[[EngineSnapshot], float]], ...] = (
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
    ("xllm:last_step_seconds", "Duration of the last step", lambda e: e.last_step_ms / 1000),
)

_COUNTERS: tuple[tuple[str, str, Callable[[EngineSnapshot], float]], ...] = (
    ("vllm:num_preemptions", "Preempted sequences", lambda e: e.num_preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda e: e.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda e: e.prefix_hits),
    ("vllm:prompt_tokens", "Prompt tokens processed", lambda e: e.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated", lambda e: e.generation_tokens),
    ("xllm:engine_steps", "Steps run", lambda e: e.step),
    ("xllm:program_captures", "Programs made, one for each shape bucket", lambda e: e.program_captures),
    ("xllm:program_replays", "Programs run", lambda e: e.program_replays),
    ("xllm:eager_steps", "Steps beyond every bucket", lambda e: e.num_eager_steps),
    ("xllm:engine_requests_accepted", "Requests the engine accepted", lambda e: e.num_accepted),
    ("xllm:engine_requests_ended", "Requests the engine ended", lambda e: e.num_ended),
)


class _SnapshotCollector(Collector):
    """Metrics that are read, not observed."""

    def __init__(self) -> None:
        self.front: Readable | None = None
        self.num_tasks = 0

    def collect(self) -> Iterator[Metric]:
        if self.front is None:
            return
        snapshot = self.front.snapshot()
        for name, help, read in _GAUGES:
            yield _family(GaugeMetricFamily(name, help, labels=_LABELS), snapshot.instances, read)
        for name, help, read in _COUNTERS:
            yield _family(CounterMetricFamily(name, help, labels=_LABELS), snapshot.instances, read)
        up = GaugeMetricFamily("xllm:instance_up", "1 while the instance is connected", labels=_LABELS)
        for i in snapshot.instances:
            up.add_metric((i.model_id, i.name), float(i.alive))
        yield up
        yield GaugeMetricFamily("xllm:front_tasks", "Tasks of the front's event loop", self.num_tasks)
        yield GaugeMetricFamily("xllm:inflight_requests", "Accepted, not ended", snapshot.num_inflight_reqs)
        yield GaugeMetricFamily("xllm:inflight_tokens", "Their prompt tokens", snapshot.num_inflight_tokens)
        yield CounterMetricFamily("xllm:requests_accepted", "Accepted requests", snapshot.num_accepted)
        yield CounterMetricFamily("xllm:requests_refused", "Refused requests", snapshot.num_refused)
        yield CounterMetricFamily(
            "xllm:divergences", "Replayed tokens that differed", snapshot.num_divergences
        )
        yield CounterMetricFamily("xllm:stale_frames", "Frames of old attempts", snapshot.num_stale_frames)
        yield _cache_config(self.front.models())


_LABELS = ("model_name", "engine")
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
