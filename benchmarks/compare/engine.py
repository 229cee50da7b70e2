"""The two ways to reach an engine, HTTP and lines of JSON to a worker, behind one small interface.

What is engine-specific (command, environment) is decided in `adapters`; this only runs it.
"""

from __future__ import annotations

import asyncio
import json
import select
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.compare.limits import Promise, hopeless_count
from benchmarks.compare.openloop import run_while_kept
from benchmarks.compare.process import EngineFailed, Tree
from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.generator import Target, run_load
from xllm.cli.bench.metrics import Outcome
from xllm.cli.bench.online import first_model
from xllm.cli.http_client import Server
from xllm.clock import SystemClock
from xllm.errors import XllmError

TURN_TIMEOUT_S = 1800.0
"""An engine that hangs ends its own part of the comparison, not all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start an engine. `port` is None for a worker. `about`: what the results say of it."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    about: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """A started engine."""

    tree: Tree

    def wait_ready(self, timeout_s: float) -> None:
        """Block until it answers. Raises EngineFailed."""

    def measure(
        self,
        asks: Sequence[Ask],
        at_s: Sequence[float],
        concurrency: int | None,
        promise: Promise | None = None,
    ) -> list[Outcome]:
        """One run; failed requests are outcomes with an error. Raises EngineFailed when it is gone.

        With a promise it ends early once that is broken, and then has fewer outcomes than asks.
        """


def start(launch: Launch, log: Path) -> Engine:
    if launch.port is None:
        return Worker(launch, log)
    return HttpServer(launch, log)


class HttpServer:
    """Measured by the machinery of `xllm bench serve`."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.tree = Tree(launch.command, launch.env, log)
        self._server = Server.parse(f"http://127.0.0.1:{launch.port}")
        self._model = ""

    def wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.tree.check()
            try:
                self._model = asyncio.run(first_model(self._server, ""))
            except XllmError:
                time.sleep(0.1)
                continue
            # Listed is not loaded: llama.cpp answers 503 until the weights are in.
            if not self.measure([Ask(prompt="Hello", output_len=2)], [0.0], 1)[0].error:
                return
            time.sleep(0.1)
        raise EngineFailed(f"not ready after {timeout_s:.0f} s: {self.tree.last_line()}")

    def measure(
        self,
        asks: Sequence[Ask],
        at_s: Sequence[float],
        concurrency: int | None,
        promise: Promise | None = None,
    ) -> list[Outcome]:
        self.tree.check()
        return asyncio.run(self._run(asks, at_s, concurrency, promise))

    async def _run(
        self,
        asks: Sequence[Ask],
        at_s: Sequence[float],
        concurrency: int | None,
        promise: Promise | None,
    ) -> list[Outcome]:
        target = Target(server=self._server, model=self._model)
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                if promise is not None:
                    return await run_while_kept(target, asks, at_s, SystemClock(), promise)
                return await run_load(target, asks, at_s, SystemClock(), max_concurrency=concurrency)
        except TimeoutError as error:
            raise EngineFailed(f"did not finish within {TURN_TIMEOUT_S:.0f} s") from error


class Worker:
    """A library in a process of its own; see `workers`. One line of JSON each way per run."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.tree = Tree(launch.command, launch.env, log, talk=True)

    def wait_ready(self, timeout_s: float) -> None:
        self._read(timeout_s)

    def measure(
        self,
        asks: Sequence[Ask],
        at_s: Sequence[float],
        concurrency: int | None,
        promise: Promise | None = None,
    ) -> list[Outcome]:
        run: dict[str, Any] = {
            "prompts": [ask.prompt for ask in asks],
            "output_lens": [ask.output_len for ask in asks],
            "at_s": list(at_s),
            "concurrency": concurrency or len(asks),
        }
        if promise is not None:
            run |= {
                "max_tpot_s": promise.tpot_s,
                "max_ttft_s": promise.ttft_s,
                "hopeless": hopeless_count(promise.num_requests),
            }
        pipe = self.tree.process.stdin
        if pipe is None:
            raise EngineFailed("the worker has no input")
        try:
            pipe.write(json.dumps(run).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise EngineFailed(f"the worker is gone: {self.tree.last_line()}") from error
        return [Outcome(**row) for row in self._read(TURN_TIMEOUT_S)["outcomes"]]

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """The next line; workers write whole lines, so once one begins it also ends."""
        pipe = self.tree.process.stdout
        if pipe is None or not select.select([pipe], [], [], timeout_s)[0]:
            raise EngineFailed(f"no answer within {timeout_s:.0f} s")
        line = pipe.readline()
        if not line:
            raise EngineFailed(f"the worker is gone: {self.tree.last_line()}")
        found: dict[str, Any] = json.loads(line)
        return found
