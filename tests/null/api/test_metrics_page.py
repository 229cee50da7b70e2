"""docs/metrics.md says what is exported: every metric, its type and its labels, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from tests.null.api.conftest import Site
from tests.null.repo import ROOT
from xllm.cli.watching import watch_cluster
from xllm.clock import SystemClock
from xllm.config import ClusterConfig, FrontConfig
from xllm.service.cluster import ClusterService
from xllm.service.handover.record import HandoverRecord
from xllm.service.router.base import Placement

ROW = re.compile(r"^\| `((?:vllm|xllm):\w+)` \| (\w+) \| ([\w, ]*?) ?\| .+ \|$", re.MULTILINE)

DONE = HandoverRecord(
    request_id="r",
    attempt=0,
    source="a",
    target="b",
    reason="prefill",
    mode="push",
    outcome="done",
    num_bytes=4096,
    transfer_ms=8.0,
    exposed_ms=2.0,
)


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = ROW.findall(text)
    found = {name: (kind, frozenset(filter(None, re.split(r", ?", labels)))) for name, kind, labels in rows}
    assert len(found) == len(rows), "a metric is documented twice"
    assert len(rows) == sum(line.startswith("| `") for line in text.splitlines()), "a row cannot be read"
    return found


async def exported(site: Site) -> dict[str, tuple[str, frozenset[str]]]:
    """family → type, label names; every family must have a sample, or its labels cannot be seen."""
    text = (await site.client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        assert family.samples, f"{family.name} has no sample: let something happen that it counts"
        found[family.name] = (family.type, frozenset(family.samples[0].labels) - {"le"})
    return found


async def test_the_page_and_the_exposition_agree(site: Site) -> None:
    await site.complete(max_tokens=3)
    await site.complete(max_tokens=10**9)
    # What no sample engine does: faults, an abort, a policy that predicts.
    metrics = site.metrics
    cluster = ClusterConfig(registry="static://127.0.0.1:9")
    service = ClusterService(FrontConfig(), cluster, SystemClock())
    watch_cluster(metrics, service)
    metrics.on_placed("r", Placement(instance="engine-0", reasons=("hit_tokens=3/4",), ttft_ms=5.0), 0)
    metrics.on_delta("r", "sample", None, 0.01, first=True)  # type: ignore[arg-type]
    metrics.on_instance("engine-0", "suspect", "silent", 2.0)
    metrics.on_resumed("r", "engine-0", 0.5)
    metrics._aborted.labels("sample").inc()
    metrics.on_handover(DONE)
    metrics.on_resumed("r", "engine-0", 0.01)
    site.front._moves.num_failures["timeout"] += 1
    site.front._moves.num_by_outcome["prefill", "done"] += 1
    site.front._dispatch.num_moves["lost"] += 1
    site.front._guard.num_deaths["crash"] += 1
    site.front._board.num_switches["decode", "prefill", "ttft"] += 1
    assert await exported(site) == documented()
    await service.close()


async def test_what_happens_is_counted_under_its_cause(site: Site) -> None:
    metrics = site.metrics
    await site.complete(max_tokens=10**9)
    for reasons, attempt in ((("hit_tokens=3/4",), 0), (("hit_tokens=0/4",), 0), (("turn=1",), 1)):
        metrics.on_placed("r", Placement(instance="engine-0", reasons=reasons, ttft_ms=20.0), attempt)
    metrics.on_placed("q", Placement(instance="engine-0", reasons=(), ttft_ms=20.0), 0)
    metrics.on_delta("q", "sample", None, 0.01, first=True)  # type: ignore[arg-type]
    for reason in ("crash", "drained"):
        metrics.on_instance("engine-0", "lost", reason, 0.2)
    text = (await site.client.get("/metrics")).text
    for line in (
        'xllm:requests_refused_total{reason="context_length_exceeded"} 1.0',
        'xllm:placements_total{attempt="first",prefix="hit"} 1.0',
        'xllm:placements_total{attempt="first",prefix="miss"} 1.0',
        'xllm:placements_total{attempt="again",prefix="unknown"} 1.0',
        'xllm:ttft_prediction_error_ratio_sum{model_name="sample"} 1.0',
        'xllm:fault_detect_seconds_count{finding="death"} 1.0',
    ):
        assert line in text.splitlines(), line


async def test_a_hand_over_is_told_with_its_bytes_and_what_of_it_was_hidden(site: Site) -> None:
    metrics = site.metrics
    metrics.on_handover(replace(DONE, outcome="failed", code="timeout", num_bytes=7))
    metrics.on_handover(DONE)
    metrics.on_placed("r", Placement(instance="b", reasons=("handover=prefill", "from=a")), 1)
    metrics.on_resumed("r", "b", 0.012)
    metrics.on_resumed("r", "b", 3.0)
    text = (await site.client.get("/metrics")).text
    for line in (
        'xllm:kv_transfer_bytes_total{reason="prefill"} 4096.0',
        'xllm:kv_transfer_seconds_sum{reason="prefill"} 0.008',
        'xllm:kv_transfer_hidden_ratio_sum{reason="prefill"} 0.75',
        "xllm:handover_gap_seconds_sum 0.012",
        "xllm:move_gap_seconds_sum 3.0",
        'xllm:placements_total{attempt="handover",prefix="unknown"} 1.0',
    ):
        assert line in text.splitlines(), line
