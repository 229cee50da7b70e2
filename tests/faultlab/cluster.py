"""Services and instances as processes of their own over one registry, on the null device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.faultlab.lab import MODEL, environment, flags
from xllm.testing.server_process import ServerProcess

TTL_S = 2.0
RELIST_S = 1.0


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 40.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise AssertionError(f"it did not happen within {limit_s:g} s: {what}")
        time.sleep(0.02)


class Cluster:
    """What a test started; `close` ends all of it."""

    def __init__(self, folder: Path, registry: str, pace_ms: float = 0.0, **settings: Any) -> None:
        self.folder = folder
        self.registry = registry
        self._env = environment(pace_ms, lease_ttl_s=TTL_S, relist_s=RELIST_S, **settings)
        self._running: list[ServerProcess] = []

    def service(self, *args: str) -> ServerProcess:
        """A front that listens; it may know nobody yet."""
        return self._start("service", "--registry", self.registry, *args)

    def instance(self, *args: str, model: str = MODEL, **settings: Any) -> ServerProcess:
        """An instance that is loaded and listens; it may not be registered yet. `model` is its model's id."""
        env = self._env | {f"XLLM_{name.upper()}": str(value) for name, value in settings.items()}
        words = [model if word == MODEL else word for word in flags(self.folder)]
        return self._start("instance", *words, "--registry", self.registry, *args, env=env)

    def instances(self, count: int) -> list[ServerProcess]:
        return [self.instance() for _ in range(count)]

    def _start(self, command: str, *args: str, env: dict[str, str] | None = None) -> ServerProcess:
        process = ServerProcess(args, env or self._env, command=command)
        self._running.append(process)
        process.wait_ready(60)
        return process

    def close(self) -> None:
        for process in self._running:
            process.process.kill()
        for process in self._running:
            process.stop()


@contextlib.contextmanager
def cluster(folder: Path, registry: str, pace_ms: float = 0.0, **settings: Any) -> Iterator[Cluster]:
    made = Cluster(folder, registry, pace_ms, **settings)
    try:
        yield made
    finally:
        made.close()


def said(process: ServerProcess, text: str) -> int:
    """How many of its lines contain the text."""
    return sum(text in line for line in tuple(process.lines))


def num_connected(service: ServerProcess) -> int:
    """Connections to instances that were made so far."""
    return said(service, "is connected")


def wait_connected(service: ServerProcess, count: int) -> None:
    wait_for(lambda: num_connected(service) >= count, f"{count} instances are connected")


def is_ready(service: ServerProcess) -> bool:
    return httpx.get(f"{service.base_url}/ready", timeout=10, trust_env=False).status_code == 200
