"""Streams over three engines of the real model under SIGKILL and SIGSTOP (F3, F12): nobody notices.

Ten kills here; a hundred, and more zombies, in `make robustness`. Every answer is compared, token for token,
text, logprobs, ends and usage, with the same request's answer before any fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.faults import faults
from benchmarks.faults.run import ENVIRONMENT, golden, killer, stopper, under_faults
from benchmarks.faults.streams import Answer, bodies
from xllm.testing.server_process import ServerProcess, serve

NUM_STREAMS = 32
FLAGS = ("--max-model-len", "1024", "--num-pages", "400", "--instances", "mixed:3")
BODIES = bodies("smollm2", 36, 1, max_tokens=96)


@pytest.fixture(scope="module")
def server(smollm2: str) -> Iterator[ServerProcess]:
    with serve(smollm2, *FLAGS, env=ENVIRONMENT) as process:
        faults.wait_ready(process.base_url, 3)
        yield process


@pytest.fixture(scope="module")
def wanted(server: ServerProcess) -> list[Answer]:
    return asyncio.run(golden(server.base_url, BODIES))


def run(server: ServerProcess, wanted: list[Answer], inject, num_faults: int, pause_s: float):
    return asyncio.run(
        under_faults(
            server.base_url,
            BODIES,
            wanted,
            inject,
            num_faults=num_faults,
            num_streams=NUM_STREAMS,
            seed=num_faults,
            pause_s=pause_s,
            settle_s=1.0,
        )
    )


@pytest.mark.slow
def test_ten_kills_under_32_streams_change_no_answer(server: ServerProcess, wanted: list[Answer]) -> None:
    outcome = run(server, wanted, killer(server.base_url), 10, 1.0)
    assert len(outcome.faults_s) == 10
    assert outcome.num_answers >= NUM_STREAMS
    assert outcome.problems() == []
    faults.wait_ready(server.base_url, 3)


@pytest.mark.slow
def test_a_zombie_that_comes_back_changes_no_answer(server: ServerProcess, wanted: list[Answer]) -> None:
    outcome = run(server, wanted, stopper(server.base_url, 4.0), 2, 1.0)
    assert len(outcome.faults_s) == 2
    assert outcome.problems() == []
    assert server.count("xllm:instance_suspicions_total") >= 2
    assert server.count("xllm:divergences_total") == 0
    faults.wait_ready(server.base_url, 3)
