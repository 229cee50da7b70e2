"""The property every schedule must keep: each accepted request ends exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from xllm.wire.messages import Frame


def assert_terminal(accepted: Iterable[str], frames: Iterable[Frame]) -> None:
    """Raise AssertionError unless each accepted id has one `last` frame, with nothing after it."""
    ends: Counter[str] = Counter()
    for frame in frames:
        if ends[frame.request_id]:
            raise AssertionError(f"output after the terminal event of {frame.request_id}")
        if frame.last:
            ends[frame.request_id] += 1
    for request_id in accepted:
        if ends[request_id] != 1:
            raise AssertionError(f"{request_id} ended {ends[request_id]} times")
