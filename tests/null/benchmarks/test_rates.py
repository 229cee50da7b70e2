"""The search for the highest rate: it finds the edge, confirms it, and never claims what it did not see."""

from __future__ import annotations

import asyncio
import math

import pytest

from benchmarks.compare import openloop
from benchmarks.compare.limits import Promise, Reading, hopeless_count
from benchmarks.compare.search import GRID, MIN_INDEX, Search, index_of, rate_of
from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.generator import Target
from xllm.cli.bench.metrics import Outcome, summarise
from xllm.cli.http_client import Server
from xllm.clock import SystemClock

TARGET = Target(server=Server.parse("http://127.0.0.1:1"), model="none")


def outcome(tpot_s: float, ttft_s: float = 0.1, error: str = "") -> Outcome:
    # 11 tokens: ten gaps.
    end_s = ttft_s + 10 * tpot_s
    return Outcome(start_s=0.0, ttft_s=ttft_s, end_s=end_s, num_output_tokens=11, error=error)


class Engine:
    """p99 TPOT grows with the rate; 50 ms at `edge` requests/s. Long runs see `slower` times that."""

    def __init__(self, edge: float, slower: float = 1.0, max_runs: int = 1000) -> None:
        self.edge, self.slower, self.max_runs = edge, slower, max_runs
        self.runs: list[tuple[int, int, float]] = []

    def __call__(self, index: int, promise: Promise) -> Reading | None:
        if len(self.runs) == self.max_runs:
            return None
        self.runs.append((index, promise.num_requests, promise.tpot_s))
        tpot_s = 0.05 * rate_of(index) / self.edge * (self.slower if promise.num_requests >= 300 else 1.0)
        outcomes = [outcome(tpot_s)] * promise.num_requests
        if tpot_s > promise.tpot_s:
            outcomes = outcomes[: hopeless_count(promise.num_requests)]
        return Reading.of(index, promise, outcomes)


@pytest.mark.parametrize("edge", [0.4, 1.0, 1.95, 3.3, 7.0])
def test_the_rate_found_is_within_one_step_of_the_edge_and_confirmed(edge: float) -> None:
    engine = Engine(edge)
    found = Search(run=engine, start=index_of(2.0)).find(0.05)
    assert found.ended
    assert found.reading is not None
    assert found.reading.confirms
    assert found.rate <= edge < found.rate * GRID * 1.01
    assert len(engine.runs) <= 12


def test_all_limits_share_one_ladder() -> None:
    engine = Engine(2.0)
    search = Search(run=engine, start=index_of(2.0))
    rates = [search.find(limit).rate for limit in (0.05, 0.1, 0.03)]
    for rate, edge in zip(rates, (2.0, 4.0, 1.2), strict=True):
        assert rate <= edge < rate * GRID * 1.01
    assert len(engine.runs) == len(set(engine.runs)) <= 20


def test_a_long_run_that_fails_steps_down_until_one_holds() -> None:
    engine = Engine(2.0, slower=1.15)
    found = Search(run=engine, start=index_of(2.0)).find(0.05)
    assert found.reading is not None
    assert found.reading.confirms
    assert found.rate <= 2.0 / 1.15 < found.rate * GRID * 1.01


def test_without_time_what_was_not_confirmed_is_not_called_confirmed() -> None:
    engine = Engine(2.0, max_runs=2)
    found = Search(run=engine, start=index_of(1.0)).find(0.05)
    assert not found.ended
    assert found.reading is not None
    assert not found.reading.confirms


def test_an_engine_that_keeps_no_rate_gets_none() -> None:
    found = Search(run=Engine(0.01), start=index_of(2.0)).find(0.05)
    assert (found.rate, found.reading, found.ended) == (0.0, None, True)
    assert rate_of(MIN_INDEX) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("num", [2, 64, 101, 300, 301])
def test_a_run_is_hopeless_exactly_when_no_rest_can_bring_its_p99_back(num: int) -> None:
    promise = Promise(tpot_s=0.05, num_requests=num)
    many = hopeless_count(num)
    slow, fast = outcome(0.0501), outcome(0.0)
    assert promise.broken([slow] * many, [], 11)
    assert summarise([slow] * many + [fast] * (num - many), {})["p99_tpot_ms"] > 50.0
    assert not promise.broken([slow] * (many - 1), [], 11)
    assert summarise([outcome(0.0500001)] * (many - 1) + [fast] * (num - many + 1), {})["p99_tpot_ms"] <= 50.0


def test_requests_that_are_too_old_to_keep_both_limits_count_before_they_end() -> None:
    promise = Promise(tpot_s=0.05, num_requests=64)
    # 2 s + 10 gaps of 50 ms; of three such requests two are over the same limit.
    assert promise.broken([], [2.6] * 3, 11)
    assert not promise.broken([], [2.6] * 2, 11)
    assert not promise.broken([], [2.4] * 30, 11)


def test_a_failed_request_breaks_a_rate() -> None:
    promise = Promise(tpot_s=0.05, num_requests=300)
    outcomes = [outcome(0.01)] * 299 + [outcome(0.01, error="HTTP 500")]
    assert promise.broken(outcomes, [], 11)
    assert Reading.of(0, promise, outcomes).keeps(0.05) is False


def test_a_run_given_up_for_a_strict_limit_says_nothing_about_a_loose_one() -> None:
    reading = Reading.of(0, Promise(tpot_s=0.05, num_requests=300), [outcome(0.06)] * 4)
    assert reading.keeps(0.03) is False
    assert reading.keeps(0.05) is False
    assert reading.keeps(0.1) is None
    assert not reading.confirms


def test_late_first_tokens_break_a_rate_however_smooth_the_rest() -> None:
    reading = Reading.of(0, Promise(tpot_s=0.05, num_requests=300), [outcome(0.01, ttft_s=2.5)] * 300)
    assert reading.keeps(0.05) is False


def test_a_run_is_given_up_while_requests_are_under_way_and_they_are_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = []

    async def send(_target: Target, ask: Ask, _clock: SystemClock, _origin: float) -> Outcome:
        try:
            if ask.prompt == "hangs":
                await asyncio.Event().wait()
            return outcome(1.0)
        finally:
            ended.append(ask.prompt)

    monkeypatch.setattr(openloop, "send", send)
    asks = [Ask(prompt=p, output_len=11) for p in ("slow", "hangs", "slow", "never sent")]
    promise = Promise(tpot_s=0.05, num_requests=4)
    run = openloop.run_while_kept(TARGET, asks, [0.0, 0.0, 0.0, math.inf], SystemClock(), promise)
    assert len(asyncio.run(run)) == 2
    assert sorted(ended) == ["hangs", "slow", "slow"]
