"""The step's threads ask for a long slice; threads started later have it too, others do not."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from xllm.engine.time_slice import SLICE_NS, ask_long_slice, ask_usual_slice, granted_slice_ns


def in_thread(work: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_and_its_children_get_the_long_slice_and_others_do_not() -> None:
    before = in_thread(granted_slice_ns)
    if not before:
        pytest.skip("this system does not tell a thread's time slice (Linux 6.12 does)")

    def ask() -> tuple[object, ...]:
        asked, mine, child = ask_long_slice(), granted_slice_ns(), in_thread(granted_slice_ns)
        return asked, mine, child, ask_usual_slice(), granted_slice_ns()

    assert in_thread(ask) == (True, SLICE_NS, SLICE_NS, True, before)
    assert in_thread(granted_slice_ns) == before
