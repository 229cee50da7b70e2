"""Binding to CPUs: the list is read strictly, and every thread of the process is bound or none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from xllm.engine.platform.host import bind_to_cpus, num_cores, parse_cpus
from xllm.errors import ConfigError

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("5-5", {5}), ("7,1,1-2", {1, 2, 7})],
)
def test_lists_of_cpus_are_read_as_taskset_reads_them(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text", ["", ",", "0,", "3-1", "-1", "1-", "a", "0x1", " 1", "1;2", "99999", "1-2-3", "0:2", "٣"]
)
def test_anything_else_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 0-3,8"):
        parse_cpus(text)


@pytest.fixture
def affinity() -> Iterator[set[int]]:
    """What this process may use; every thread has it back afterwards."""
    before = os.sched_getaffinity(0)
    yield before
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # one that has just ended
            os.sched_setaffinity(int(thread), before)


def test_without_a_list_nothing_is_bound(affinity: set[int]) -> None:
    assert bind_to_cpus(None) is None
    assert os.sched_getaffinity(0) == affinity


def test_threads_that_run_and_threads_to_come_are_bound(affinity: set[int]) -> None:
    one = max(affinity)
    go, seen = threading.Event(), dict[str, set[int]]()

    def look(name: str) -> None:
        go.wait(20)
        seen[name] = os.sched_getaffinity(0)

    early = threading.Thread(target=look, args=("early",))
    early.start()
    assert bind_to_cpus(str(one)) == f"cpus={one}: as asked"
    late = threading.Thread(target=look, args=("late",))
    late.start()
    go.set()
    early.join()
    late.join()
    assert seen == {"early": {one}, "late": {one}}
    assert num_cores() == 1


def test_a_cpu_that_may_not_be_used_is_named_and_nothing_is_bound(affinity: set[int]) -> None:
    missing = max(affinity) + 1
    with pytest.raises(ConfigError, match=f"may not use CPU {missing}; it may use "):
        bind_to_cpus(f"{min(affinity)},{missing}")
    assert os.sched_getaffinity(0) == affinity


def test_a_front_is_told_why_an_engine_cannot_be_bound() -> None:
    command = [sys.executable, "-m", "xllm.cli.main", "serve", "smollm2", "--cpus", "9999", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "cpus=9999: this process may not use CPU 9999" in done.stderr
    assert "Traceback" not in done.stderr
