"""What is counted, under vLLM's names where it has one and `xllm:*` where it has not.

One registry per server. Gauges and engine counters are read from the front's snapshot when somebody
asks; only durations are observed as they happen. Labels come from closed sets: routes, statuses,
served models, finish reasons. Nothing a client sends becomes a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from xllm.api.snapshot_metrics import Readable, SnapshotCollector
from xllm.api.token_gaps import TokenGaps
from xllm.observability.buckets import GAP_S, LATENCY_S, LENGTH, RATIO, SHARE, TOKEN_S, TRANSFER_S, TTFT_S
from xllm.service.draft import RequestDraft
from xllm.service.failover.blame import DeathCause
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceState
from xllm.service.router.base import Placement
from xllm.service.snapshot import NullObserver, RequestRecord
from xllm.service.stream import Delta
from xllm.types import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REASONS = frozenset(r.value for r in FinishReason)
_DEATHS = frozenset(get_args(DeathCause))


class Metrics(NullObserver):
    """A `FrontObserver` that also counts responses and renders everything."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._source = SnapshotCollector()
        self._registry.register(self._source)
        by_model = ("model_name",)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, by_model, registry=self._registry, buckets=buckets)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Submission to first output", TTFT_S)
        self._itl = TokenGaps("vllm:inter_token_latency_seconds", "Between outputs of a request", TOKEN_S)
        self._registry.register(self._itl)
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
        self._refused = Counter(
            "xllm:requests_refused", "Requests not admitted", ("reason",), registry=self._registry
        )
        self._placements = Counter(
            "xllm:placements",
            "Placements: first, again or handed over, and whether on a cached prefix",
            ("attempt", "prefix"),
            registry=self._registry,
        )
        self._ttft_error = histogram(
            "xllm:ttft_prediction_error_ratio", "Relative error of the predicted time to first token", RATIO
        )
        self._predicted_s: dict[str, float] = {}
        self._detect = Histogram(
            "xllm:fault_detect_seconds",
            "From an instance's last progress to the finding",
            ("finding",),
            registry=self._registry,
            buckets=GAP_S,
        )
        self._gap = Histogram(
            "xllm:move_gap_seconds",
            "From a moved request's last output to its next",
            registry=self._registry,
            buckets=GAP_S,
        )

        self._transferred = Counter(
            "xllm:kv_transfer_bytes",
            "KV bytes that moved requests took along",
            ("reason",),
            registry=self._registry,
        )

        def of_moves(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, ("reason",), registry=self._registry, buckets=buckets)

        self._transfer = of_moves("xllm:kv_transfer_seconds", "In which bytes of a move moved", TRANSFER_S)
        self._hidden = of_moves(
            "xllm:kv_transfer_hidden_ratio", "Share of that time that passed beside computing", SHARE
        )
        self._switch_gap = Histogram(
            "xllm:handover_gap_seconds",
            "From a handed-over request's last output at its source to the next",
            registry=self._registry,
            buckets=TRANSFER_S,
        )
        self._switched: set[str] = set()

    # -- FrontObserver --------------------------------------------------------------------------

    def on_refused(self, draft: RequestDraft, code: str) -> None:
        self._refused.labels(code).inc()

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        self._placements.labels(_attempt_class(placement, attempt), _prefix_class(placement)).inc()
        if placement.ttft_ms is not None and not attempt:
            self._predicted_s[request_id] = placement.ttft_ms / 1000
        else:
            self._predicted_s.pop(request_id, None)  # of a moved request no prediction can come true

    def on_moved(
        self, request_id: str, source: str, target: str, cause: str, gap_s: float, cost: MoveCost
    ) -> None:
        self._switched.discard(request_id)  # lost on the way: its gap is that of a fault

    def on_handover(self, record: HandoverRecord) -> None:
        if record.outcome != "done":
            return
        self._switched.add(record.request_id)
        self._transferred.labels(record.reason).inc(record.num_bytes)
        hidden = record.hidden_share
        if hidden is not None:
            self._transfer.labels(record.reason).observe(record.transfer_ms / 1000)
            self._hidden.labels(record.reason).observe(hidden)

    def on_resumed(self, request_id: str, instance: str, gap_s: float) -> None:
        if request_id in self._switched:
            self._switched.discard(request_id)
            self._switch_gap.observe(gap_s)
        else:
            self._gap.observe(gap_s)

    def on_instance(self, name: str, state: InstanceState, reason: str, detect_s: float) -> None:
        if state == "suspect":
            self._detect.labels("suspicion").observe(detect_s)
        elif state == "lost" and reason in _DEATHS:
            self._detect.labels("death").observe(detect_s)

    def on_delta(self, request_id: str, model: str, delta: Delta, gap_s: float, *, first: bool) -> None:
        if first:
            self._ttft.labels(model).observe(gap_s)
            predicted_s = self._predicted_s.pop(request_id, None)
            if predicted_s is not None and gap_s > 0:
                self._ttft_error.labels(model).observe(abs(predicted_s - gap_s) / gap_s)
            return
        self._itl.observe(model, gap_s)

    def on_ended(self, record: RequestRecord) -> None:
        self._predicted_s.pop(record.request_id, None)
        self._switched.discard(record.request_id)
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

    def add_gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A number that somebody else keeps, read on each scrape. For who composes the server."""
        self._source.gauges[name] = (help, value)

    def add_counter(self, name: str, help: str, value: Callable[[], float]) -> None:
        """As `add_gauge`, of a number that only grows; the exposition appends `_total`."""
        self._source.counters[name] = (help, value)

    def render(self, front: Readable, *, num_tasks: int) -> bytes:
        """The exposition text; `num_tasks` are the tasks of the front's event loop."""
        self._source.front = front
        self._source.num_tasks = num_tasks
        return generate_latest(self._registry)


def _attempt_class(placement: Placement, attempt: int) -> str:
    if not attempt:
        return "first"
    return "handover" if placement.reasons[:1] and placement.reasons[0].startswith("handover=") else "again"


def _prefix_class(placement: Placement) -> str:
    """From the reasons of the policy, which are free text, to a closed set: hit, miss or unknown."""
    told = next((r for r in placement.reasons if r.startswith("hit_tokens=")), None)
    if told is None:
        return "unknown"
    num_tokens = told.removeprefix("hit_tokens=").partition("/")[0]
    return "miss" if num_tokens == "0" else "hit"
