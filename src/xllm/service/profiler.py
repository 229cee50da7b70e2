"""Profiles of a front and its engines: begun together, ended by hand or by time, written as one trace file.

One at a time. The directory is a setting; a client names no path. What is recorded is the recorders' matter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Protocol

from xllm.clock import Clock
from xllm.config import ObservabilityConfig
from xllm.errors import RequestError
from xllm.ids import new_request_id
from xllm.observability.profile import MAX_EVENTS, MAX_S, ProcessProfile, trace_json
from xllm.service.watch.profile import FrontProfile

log = logging.getLogger(__name__)

ANSWER_S = 10.0
"""An engine answers between two steps."""


class Profiled(Protocol):
    """The part of a front that starts and collects the recordings of its engines."""

    def start_profiles(self, max_events: int, max_s: float) -> None: ...

    async def stop_profiles(self, timeout_s: float) -> dict[str, ProcessProfile | None]: ...


class Profiler:
    def __init__(self, config: ObservabilityConfig, clock: Clock) -> None:
        self.front = FrontProfile(clock)
        self._directory = None if config.profile_dir is None else Path(config.profile_dir).expanduser()
        self._max_events = max(1, min(config.profile_max_events, MAX_EVENTS))
        self._max_s = max(0.1, min(config.profile_max_s, MAX_S))
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[dict[str, object]] | None = None

    def start(self, engines: Profiled) -> dict[str, object]:
        """Raises RequestError where no directory is set, or while one runs."""
        if self._directory is None:
            raise RequestError("No directory for profiles is set (profile_dir).", code="profiling_disabled")
        if self._running:
            raise RequestError("A profile is being recorded already.", code="conflict")
        self._running = True
        self.front.begin(self._max_events, self._max_s)
        engines.start_profiles(self._max_events, self._max_s)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._max_s, self._time_is_up, engines)
        return {"max_events": self._max_events, "max_s": self._max_s}

    async def stop(self, engines: Profiled) -> dict[str, object]:
        """What was written. Raises RequestError when nothing was being recorded."""
        if not self._running:
            raise RequestError("No profile is being recorded.", code="conflict")
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        own = self.front.end(os.getpid())
        found = await engines.stop_profiles(ANSWER_S)
        profiles = [own, *(_named(name, p) for name, p in found.items() if p is not None)]
        silent = [name for name, profile in found.items() if profile is None]
        path = await asyncio.get_running_loop().run_in_executor(None, self._write, profiles)
        return {
            "file": str(path),
            "events": {p.name: len(p.events) for p in profiles},
            "dropped": sum(p.num_dropped for p in profiles),
            "unanswered": silent,
        }

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _time_is_up(self, engines: Profiled) -> None:
        self._ending = asyncio.get_running_loop().create_task(self.stop(engines))
        self._ending.add_done_callback(_tell)

    def _write(self, profiles: list[ProcessProfile]) -> Path:
        """Under a name of our own, complete or not at all."""
        directory = self._directory or Path()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / f"xllm-{time.strftime('%Y%m%d-%H%M%S')}-{new_request_id()[-8:]}.trace.json"
        part = path.with_suffix(".part")
        part.write_bytes(trace_json(profiles, {"front": os.getpid()}))
        part.replace(path)
        return path


def _named(name: str, profile: ProcessProfile) -> ProcessProfile:
    return ProcessProfile(
        name=name,
        pid=profile.pid,
        events=profile.events,
        num_dropped=profile.num_dropped,
        wall_ns=profile.wall_ns,
        monotonic_ns=profile.monotonic_ns,
    )


def _tell(ended: asyncio.Task[dict[str, object]]) -> None:
    if ended.cancelled():
        return
    error = ended.exception()
    if error is not None:
        log.warning("a profile that ended by time could not be written: %s", error)
    else:
        log.info("a profile ended by time: %s", ended.result()["file"])
