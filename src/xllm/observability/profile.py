"""A recording of what one process did when: events in a bounded list, and the trace file made of them.

Off it costs its caller one truth test. Not thread-safe: each recorder belongs to one thread. No I/O here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

Value = str | int | float

MAX_EVENTS = 200_000
"""Of a process: some 30 MB, and some 20 MB as a message."""
MAX_S = 600.0


class ProfileEvent(msgspec.Struct, frozen=True, array_like=True):
    """Something that began and ended, in ns of the process's monotonic clock. Events of one `track` nest;
    those with an `id` may overlap, and stand under it."""

    name: str
    track: str
    begin_ns: int
    end_ns: int
    args: dict[str, Value] = {}
    id: str = ""


class ProcessProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What one process recorded. `wall_ns` is when its monotonic clock stood at `monotonic_ns`, so that
    recordings of several machines can be laid side by side."""

    name: str
    pid: int
    events: tuple[ProfileEvent, ...]
    num_dropped: int = 0
    wall_ns: int = 0
    monotonic_ns: int = 0


class Recorder:
    """`on` between `begin` and the first of `end`, its last second and its last event."""

    def __init__(self) -> None:
        self.on = False
        self._events: list[ProfileEvent] = []
        self._num_dropped = 0
        self._max_events = 0
        self._until_ns = 0

    def begin(self, now_ns: int, max_events: int, max_s: float) -> None:
        """Start over; what was recorded before is gone."""
        self._events, self._num_dropped = [], 0
        self._max_events, self._until_ns = max_events, now_ns + int(max_s * 1e9)
        self.on = True

    def complete(
        self,
        name: str,
        track: str,
        begin_ns: int,
        end_ns: int,
        args: dict[str, Value] | None = None,
        id: str = "",
    ) -> None:
        if not self.on or end_ns > self._until_ns:
            self.on = False
        elif len(self._events) >= self._max_events:
            # The beginning is kept: of a step, its layers come with it or not at all.
            self._num_dropped += 1
        else:
            self._events.append(ProfileEvent(name, track, begin_ns, end_ns, args or {}, id))

    def end(self, name: str, pid: int, wall_ns: int, monotonic_ns: int) -> ProcessProfile:
        """What was recorded; gone from here."""
        self.on = False
        events, self._events = tuple(self._events), []
        return ProcessProfile(
            name=name, pid=pid, events=events, num_dropped=self._num_dropped, wall_ns=wall_ns,
            monotonic_ns=monotonic_ns,
        )  # fmt: skip


def trace_json(processes: Sequence[ProcessProfile], facts: Mapping[str, Value]) -> bytes:
    """The Chrome trace-event format, which Perfetto opens: times in µs since the first event."""
    starts = [_wall_ns(p, event.begin_ns) for p in processes for event in p.events]
    first_ns = min(starts, default=0)
    rows: list[dict[str, Any]] = []
    for number, process in enumerate(processes, start=1):
        rows += _process_rows(number, process, first_ns)
    other = {**facts, "dropped_events": sum(p.num_dropped for p in processes)}
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms", "otherData": other}).encode()


def _process_rows(number: int, process: ProcessProfile, first_ns: int) -> list[dict[str, Any]]:
    rows = [_named("process_name", number, 0, f"{process.name} ({process.pid})")]
    tracks = {track: i for i, track in enumerate(dict.fromkeys(e.track for e in process.events), start=1)}
    rows += [_named("thread_name", number, i, track) for track, i in tracks.items()]
    for event in process.events:
        begin_us = (_wall_ns(process, event.begin_ns) - first_ns) / 1000
        end_us = (_wall_ns(process, event.end_ns) - first_ns) / 1000
        row = {
            "name": event.name,
            "cat": event.track,
            "pid": number,
            "tid": tracks[event.track],
            "ts": begin_us,
        }
        if event.id:
            rows.append({**row, "ph": "b", "id": event.id, "args": event.args})
            rows.append({**row, "ph": "e", "id": event.id, "ts": end_us})
        else:
            rows.append({**row, "ph": "X", "dur": end_us - begin_us, "args": event.args})
    return rows


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _wall_ns(process: ProcessProfile, at_ns: int) -> int:
    return at_ns - process.monotonic_ns + process.wall_ns
