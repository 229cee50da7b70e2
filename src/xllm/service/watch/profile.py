"""What a front records while somebody asked for a profile: its requests from acceptance to end, and HTTP.

An observer like the others; off it pays one truth test an event.
"""

from __future__ import annotations

from xllm.clock import Clock
from xllm.observability.profile import ProcessProfile, Recorder, Value
from xllm.service.snapshot import NullObserver, RequestRecord

REQUESTS, HTTP = "requests", "HTTP"


class FrontProfile(NullObserver):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recorder = Recorder()

    @property
    def on(self) -> bool:
        return self._recorder.on

    def begin(self, max_events: int, max_s: float) -> None:
        self._recorder.begin(self._now_ns(), max_events, max_s)

    def end(self, pid: int) -> ProcessProfile:
        return self._recorder.end("front", pid, int(self._clock.wall_s() * 1e9), self._now_ns())

    def on_ended(self, record: RequestRecord) -> None:
        """The whole request, and in it the wait for its first token and the answer."""
        if not self.on:
            return
        name, end_ns = record.request_id, self._now_ns()
        begin_ns = end_ns - int(record.e2e_s * 1e9)
        args: dict[str, Value] = {"request": name, "instance": record.instance, "outcome": record.outcome}
        self._recorder.complete("request", REQUESTS, begin_ns, end_ns, args, name)
        if record.ttft_s is not None:
            first_ns = min(end_ns, begin_ns + int(record.ttft_s * 1e9))
            self._recorder.complete("to first token", REQUESTS, begin_ns, first_ns, args, name)
            self._recorder.complete("answer", REQUESTS, first_ns, end_ns, args, name)

    def on_http(self, route: str, request_id: str, status: int, began_s: float) -> None:
        args: dict[str, Value] = {"request": request_id, "status": status}
        begin_ns = int(began_s * 1e9)
        self._recorder.complete(route, HTTP, begin_ns, self._now_ns(), args, request_id)

    def _now_ns(self) -> int:
        return int(self._clock.monotonic_s() * 1e9)
