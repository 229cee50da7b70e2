"""Arrival processes and metric maths, against cases worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from xllm.cli.bench import datasets
from xllm.cli.bench.arrivals import arrival_times, from_timestamps
from xllm.cli.bench.metrics import (
    Outcome,
    distribution,
    meets,
    parse_goodput,
    peak_concurrency,
    peak_output_rate,
    summarise,
)
from xllm.errors import ConfigError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Starts at 1 s, first output at 1.5 s, then after 0.1 s and 0.3 s; done 2.0 s.
A = Outcome(start_s=1.0, ttft_s=0.5, end_s=2.0, itls_s=[0.1, 0.3], num_input_tokens=10, num_output_tokens=3)
# One token only.
B = Outcome(start_s=0.0, ttft_s=0.2, end_s=0.25, num_input_tokens=20, num_output_tokens=1)
FAILED = Outcome(start_s=0.5, end_s=4.0, error="HTTP 429")


def test_an_infinite_rate_sends_everything_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, rng()) == [0.0, 0.0, 0.0]


def test_arrivals_begin_at_zero_and_never_go_back() -> None:
    times = arrival_times(1000, 5.0, 0.3, rng())
    assert times[0] == 0.0
    assert times == sorted(times)
    assert len(times) == 1000


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_asked_mean_and_variation(burstiness: float) -> None:
    gaps = np.diff(arrival_times(200_001, 8.0, burstiness, rng(7)))
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.02)


def test_equal_seeds_give_equal_arrivals() -> None:
    assert arrival_times(50, 3.0, 1.0, rng(1)) == arrival_times(50, 3.0, 1.0, rng(1))
    assert arrival_times(50, 3.0, 1.0, rng(1)) != arrival_times(50, 3.0, 1.0, rng(2))


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.inf)])
def test_impossible_arrivals_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError):
        arrival_times(3, rate, burstiness, rng())


def test_a_trace_is_shifted_to_zero_and_sped_up() -> None:
    assert from_timestamps([10.0, 12.0, 16.0], 2.0) == [0.0, 1.0, 3.0]


def test_tpot_leaves_the_first_token_out() -> None:
    assert A.tpot_s == pytest.approx((1.0 - 0.5) / 2)
    assert B.tpot_s == 0.0


def test_the_summary_of_a_run_is_as_worked_out_by_hand() -> None:
    summary = summarise([A, B, FAILED], {})
    assert summary["completed"] == 2
    assert summary["failed"] == 1
    assert summary["duration"] == 4.0
    assert summary["total_input_tokens"] == 30
    assert summary["total_output_tokens"] == 4
    assert summary["request_throughput"] == pytest.approx(0.5)
    assert summary["output_throughput"] == pytest.approx(1.0)
    assert summary["total_token_throughput"] == pytest.approx(8.5)
    assert summary["mean_ttft_ms"] == pytest.approx(350)
    assert summary["median_ttft_ms"] == pytest.approx(350)
    assert summary["std_ttft_ms"] == pytest.approx(150)
    assert summary["mean_tpot_ms"] == pytest.approx(250)
    assert summary["mean_itl_ms"] == pytest.approx(200)
    assert summary["mean_e2el_ms"] == pytest.approx(625)
    assert summary["max_concurrent_requests"] == 2
    assert "request_goodput" not in summary


def test_percentiles_are_interpolated() -> None:
    row = distribution("x", [float(value) for value in range(101)])
    assert (row["p50_x_ms"], row["p90_x_ms"], row["p99_x_ms"]) == (50.0, 90.0, 99.0)
    assert distribution("x", [0.0, 10.0])["p90_x_ms"] == pytest.approx(9.0)
    assert set(distribution("x", []).values()) == {0.0}


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    summary = summarise([A, B, FAILED], parse_goodput(["ttft:500", "tpot:240"]))
    # A misses tpot (250 ms), B keeps both, the failed one keeps none.
    assert summary["request_goodput"] == pytest.approx(1 / 4.0)
    assert summary["slo_attainment"] == pytest.approx(1 / 3)
    assert meets(A, {"ttft": 500.0})
    assert not meets(FAILED, {})


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "speed:5", "ttft:0"])
def test_a_wrong_objective_is_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_goodput([word])


def test_peaks_are_found() -> None:
    # A's chunks at 1.5, 1.6, 1.9 → three tokens in second 1; B's one at 0.2.
    assert peak_output_rate([A, B]) == pytest.approx(3.0)
    assert peak_concurrency([A, B]) == 1
    assert peak_concurrency([]) == 0


def test_random_prompts_have_the_asked_lengths_and_differ() -> None:
    asks = datasets.random_prompts(5, 12, 7, rng())
    assert [len(ask.prompt.split()) for ask in asks] == [12] * 5
    assert len({ask.prompt for ask in asks}) == 5
    assert {ask.output_len for ask in asks} == {7}


def test_a_custom_file_is_repeated_when_it_is_short(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_len": 3}\n')
    asks = datasets.custom(file, 3, 9)
    assert [(ask.prompt, ask.output_len) for ask in asks] == [("one", 9), ("two", 3), ("one", 9)]


@pytest.mark.parametrize("line", ["no json", "[]", '{"prompt": 3}', '{"prompt": "a", "output_len": 0}'])
def test_a_broken_custom_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"p\.jsonl"):
        datasets.custom(file, 1, 1)


def test_an_azure_trace_gives_arrivals_and_lengths(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    asks = datasets.trace(file, 5, rng())
    assert [(len(ask.prompt.split()), ask.output_len) for ask in asks] == [(374, 44), (396, 109)]
    first, second = (ask.at_s or 0.0 for ask in asks)
    assert second - first == pytest.approx(4.314579)


def test_a_mooncake_trace_keeps_shared_prefixes_shared(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 1500, "input_length": 700, "output_length": 6, "hash_ids": [1, 3]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = datasets.trace(file, 9, rng())
    assert two.at_s == 1.5
    first, second = one.prompt.split(), two.prompt.split()
    assert (len(first), len(second)) == (600, 700)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:600]
