"""Faults against the engine processes of a running server, each proven to have happened.

Signals go to process ids that the server itself names (GET /instances), and to nothing else.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import time
from dataclasses import dataclass

import httpx
import psutil


class FaultDidNotHappenError(Exception):
    """A test that goes on would prove nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSeen:
    """One entry of GET /instances, as far as faults need it."""

    name: str
    pid: int
    state: str


@functools.lru_cache(maxsize=8)
def _client(base_url: str) -> httpx.Client:
    # Kept, since making one costs tens of milliseconds of the very cores that are watched.
    return httpx.Client(base_url=base_url, timeout=30, trust_env=False)


def engines(base_url: str) -> list[EngineSeen]:
    data = _client(base_url).get("/instances").json()["instances"]
    return [EngineSeen(name=i["id"], pid=i["pid"] or 0, state=i["state"]) for i in data]


def ready(base_url: str) -> list[EngineSeen]:
    return [e for e in engines(base_url) if e.state == "ready" and e.pid]


def wait_ready(base_url: str, count: int, timeout_s: float = 120.0) -> list[EngineSeen]:
    """Until `count` engines are ready; TimeoutError names what is there instead."""
    end_s = time.monotonic() + timeout_s
    while len(found := ready(base_url)) < count:
        if time.monotonic() > end_s:
            raise TimeoutError(f"{count} ready engines wanted, there are {engines(base_url)}")
        time.sleep(0.05)
    return found


def wait_noticed(base_url: str, engine: EngineSeen, timeout_s: float = 30.0) -> None:
    """Until the front no longer counts on this process; raises FaultDidNotHappenError if it goes on to."""
    end_s = time.monotonic() + timeout_s
    while any(e.pid == engine.pid for e in ready(base_url)):
        if time.monotonic() > end_s:
            raise FaultDidNotHappenError(f"{engine} is dead and still counts as ready")
        time.sleep(0.01)


def kill(engine: EngineSeen, timeout_s: float = 10.0) -> float:
    """SIGKILL; the moment it was sent. Raises FaultDidNotHappenError unless the process is gone."""
    watched = os.pidfd_open(engine.pid)
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        sent_s = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        if not poll.poll(timeout_s * 1000):
            raise FaultDidNotHappenError(f"{engine} is alive after SIGKILL")
    finally:
        os.close(watched)
    return sent_s


def stop(engine: EngineSeen, timeout_s: float = 10.0) -> float:
    """SIGSTOP; the moment it was sent. Raises FaultDidNotHappenError unless the process stands still."""
    sent_s = time.monotonic()
    os.kill(engine.pid, signal.SIGSTOP)
    end_s = sent_s + timeout_s
    while _state(engine.pid) != psutil.STATUS_STOPPED:
        if time.monotonic() > end_s:
            raise FaultDidNotHappenError(f"{engine} runs on after SIGSTOP")
        time.sleep(0.002)
    return sent_s


def carry_on(engine: EngineSeen) -> None:
    """SIGCONT, if it is still there."""
    try:
        os.kill(engine.pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def _state(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return None
