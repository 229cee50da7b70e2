"""Everything that looks at one front, put together: made by who composes the server."""

from __future__ import annotations

from xllm.clock import Clock
from xllm.observability.tracing import NullTracer, Tracer
from xllm.service.snapshot import FrontObserver
from xllm.service.watch.decisions import DecisionLog
from xllm.service.watch.fanout import FanOut
from xllm.service.watch.profile import FrontProfile
from xllm.service.watch.spans import RequestSpans
from xllm.service.watch.timelines import Timelines


class WatchDesk:
    """`observer` goes to the front, the desk itself to whoever answers questions."""

    def __init__(
        self,
        clock: Clock,
        *more: FrontObserver,
        tracer: Tracer | None = None,
        profile: FrontProfile | None = None,
    ) -> None:
        self.tracer: Tracer = tracer if tracer is not None else NullTracer()
        self.profile = profile if profile is not None else FrontProfile(clock)
        self.timelines = Timelines(clock)
        observers: list[FrontObserver] = [*more, self.timelines, DecisionLog(), self.profile]
        if self.tracer.enabled:
            observers.append(RequestSpans(self.tracer, clock))
        self.observer = FanOut(observers)

    def close(self) -> None:
        """Let what is still to be exported go out, within a time limit."""
        self.tracer.close()
