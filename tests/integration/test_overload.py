"""A real server under several times more requests than it can serve: short of `make bench-overload`.

The engine's steps are sleeps, so the machine's speed hardly matters; ratios are within one run.
"""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from benchmarks.overhead.__main__ import server
from benchmarks.overload import Report, lines, measure

MAX_SEQS = 8
SERVE = ["--max-num-seqs", str(MAX_SEQS)]


@pytest.fixture(scope="module")
def report() -> Report:
    with server(40.0, None, SERVE) as (port, front, engine):
        found = asyncio.run(
            measure(
                port,
                [front, engine],
                model="paced",
                seconds=8.0,
                normal_s=3.0,
                factor=8.0,
                normal_load=0.5,
                mean_tokens=16,
                concurrency=16,
                recovery_s=5.0,
                capacity_s=6.0,
            )
        )
        print("\n".join(lines(found)))
        left = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        assert "\nxllm:inflight_requests 0.0\n" in left
        assert "\nxllm:inflight_tokens 0.0\n" in left
    return found


def test_it_was_an_overload_and_most_was_refused_at_once(report: Report) -> None:
    before, over, _, _ = report.phases
    assert before.statuses == {200: before.num_asked}
    assert set(over.statuses) == {200, 429}
    assert over.num_asked > 4 * over.num_served
    assert report.retry_after_s[0] >= 1
    assert over.refused_p99_s < over.ttft_p50_s  # at once: sooner than those that wait get anything


def test_the_engine_stays_busy_with_what_was_admitted(report: Report) -> None:
    over = report.phases[1]
    # Not tokens a second: those also say what else the machine did in these eight seconds.
    assert report.mean_running > 0.75 * MAX_SEQS
    assert over.num_served == over.statuses[200]  # what is admitted is finished


def test_no_queue_grows_with_what_is_asked(report: Report) -> None:
    asked_beyond = report.phases[1].num_asked - report.phases[1].num_served
    assert report.seen.num_samples > 10
    assert report.seen.max_waiting < 0.25 * asked_beyond
    assert report.seen.max_rss_mib < report.seen.first_rss_mib + 64


def test_afterwards_it_is_as_before(report: Report) -> None:
    _, over, _, later = report.phases
    assert later.statuses == {200: later.num_asked}
    assert later.ttft_p50_s < over.ttft_p50_s / 2


def test_the_official_client_waits_as_told_and_gets_through() -> None:
    with server(40.0, None, ["--max-num-seqs", "1", "--max-num-queued-reqs", "0"]) as (port, _, _):
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as once:
            stream = once.completions.create(model="paced", prompt="a", max_tokens=40, stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                once.completions.create(model="paced", prompt="b", max_tokens=1)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            patient = once.with_options(max_retries=8)
            assert patient.completions.create(model="paced", prompt="b", max_tokens=1).usage is not None
            stream.close()
