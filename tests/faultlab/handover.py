"""Servers with roles whose engines die, or stand still, at a named point of the hand-over.

The points stand in `outside/xllm_handoverlab.py`. Every helper that waits raises when the thing does not
happen: a test that goes on would prove nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.faults import faults
from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer, BrokenStreamError, ask
from tests.faultlab.lab import environment
from tests.faultlab.tcpproxy import HEALTHY, TcpProxy
from xllm.testing.server_process import ServerProcess, serve

LIMIT_S = 60.0
ROW_MS = 0.05


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise AssertionError(f"it did not happen within {limit_s:g} s: {what}")
        time.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`number` goes to the engine that comes to `point`, after so many passes and so much time."""

    point: str
    number: signal.Signals = signal.SIGKILL
    skip: int = 0
    after_ms: float = 0.0

    def __str__(self) -> str:
        return f"{self.number.name}-{self.point}{f'+{self.skip}' if self.skip else ''}"


class HandoverLab:
    """A running server, and the folder in which its engines look for what is armed."""

    def __init__(
        self, server: ServerProcess, folder: Path, num_engines: int, proxies: tuple[TcpProxy, ...] = ()
    ) -> None:
        self.server = server
        self.num_engines = num_engines
        self.proxies = proxies
        self._folder = folder

    def arm(self, fault: Fault) -> None:
        for old in self._folder.glob("hit.*"):
            old.unlink()
        wish = {
            "point": fault.point,
            "skip": fault.skip,
            "signal": fault.number.name,
            "after_ms": fault.after_ms,
        }
        made = self._folder / "making"
        made.write_text(json.dumps(wish))
        made.rename(self._folder / "armed")

    def hit(self) -> int | None:
        """The process that came to the armed point, or None yet."""
        return next((int(p.name.removeprefix("hit.")) for p in self._folder.glob("hit.*")), None)

    def disarm(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "armed").unlink()

    async def under(self, fault: Fault, bodies: list[dict[str, Any]], *, stopped_s: float = 3.0) -> Struck:
        """All the streams at once while the fault happens. A stopped engine goes on after `stopped_s`."""
        faults.wait_ready(self.server.base_url, self.num_engines)
        self.arm(fault)
        async with self.client() as http:
            asked = [asyncio.create_task(answer_of(http, body)) for body in uncached(bodies)]
            struck = asyncio.create_task(asyncio.to_thread(self._strike, fault, stopped_s))
            try:
                answers = await asyncio.gather(*asked)
                return Struck(pid=await struck, answers=list(answers))
            finally:
                self.disarm()

    def _strike(self, fault: Fault, stopped_s: float) -> int:
        wait_for(lambda: self.hit() is not None, f"an engine comes to {fault}")
        pid = self.hit() or 0
        if fault.number is signal.SIGSTOP:
            wait_for(lambda: _state(pid) in "Tt", f"{pid} stands still")
            time.sleep(stopped_s)
            if _state(pid):
                os.kill(pid, signal.SIGCONT)
        else:
            wait_for(lambda: _state(pid) in ("", "Z"), f"{pid} is gone")
        return pid

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.base_url, timeout=120, trust_env=False)

    def pages(self) -> list[tuple[str, int, int]]:
        """(engine, pages owned by requests, pages of transfers)."""
        data = httpx.get(f"{self.server.base_url}/instances", timeout=30, trust_env=False).json()
        found = [(i["id"], i["load"]["pages"]) for i in data["instances"] if i["state"] == "ready"]
        return [(name, pages["owned"], pages["in_transfer"]) for name, pages in found]

    def wait_idle(self) -> None:
        """All engines are there, and no page of any is owned, leased or pinned."""
        faults.wait_ready(self.server.base_url, self.num_engines)
        wait_for(
            lambda: len(self.pages()) == self.num_engines and not any(o or t for _, o, t in self.pages()),
            f"all pages are given back, not {self.pages()}",
        )

    def restore(self) -> None:
        """Links are healthy again, and the engines have met."""
        for proxy in self.proxies:
            proxy.set(HEALTHY)

    def ways(self) -> set[str]:
        """In which ways its engines take pages."""
        data = httpx.get(f"{self.server.base_url}/instances", timeout=30, trust_env=False).json()
        return {kind for i in data["instances"] for kind in i["endpoints"]}

    def num_taken(self) -> int:
        """Requests that engines running now have taken over with pages that were used."""
        data = httpx.get(f"{self.server.base_url}/instances", timeout=30, trust_env=False).json()
        return sum(i["moves"]["in"] for i in data["instances"])

    def failures(self) -> dict[str, float]:
        """Of hand-overs, with what they are said to be."""
        found = self.server.metrics().items()
        return {name: count for name, count in found if name.startswith("xllm:kv_transfer_failures_total")}

    def wait_works_again(self, bodies: list[dict[str, Any]], wanted: list[Answer]) -> None:
        """Pages are given back, and requests are handed over as before."""
        self.wait_idle()
        before = self.num_taken()

        def again() -> bool:
            got = asyncio.run(golden(self.server.base_url, uncached(bodies)))
            assert Struck(pid=0, answers=list(got)).differences(wanted) == []
            return self.num_taken() > before

        wait_for(again, "hand-overs work again")
        self.wait_idle()


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """`answers` in the order of the bodies; a broken one is its error."""

    pid: int
    answers: list[Answer | BrokenStreamError]

    def differences(self, wanted: list[Answer]) -> list[str]:
        """Empty = every stream ended, and was equal to its undisturbed run."""
        return [
            f"stream {number}: {got if isinstance(got, BrokenStreamError) else first_difference(want, got)}"
            for number, (want, got) in enumerate(zip(wanted, self.answers, strict=True))
            if isinstance(got, BrokenStreamError) or got.content() != want.content()
        ]


def first_difference(want: Answer, got: Answer) -> str:
    for choice, (a, b) in enumerate(zip(want.choices, got.choices, strict=True)):
        for at, pair in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
            if pair[0] != pair[1]:
                return f"choice {choice} differs from token {at} on: {pair}"
        if a != b:
            return f"choice {choice}: wanted {a}, got {b}"
    return f"usage: wanted {want.usage}, got {got.usage}"


def uncached(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same requests, whose prefixes nobody has computed yet: else little is left to hand over."""
    salt = secrets.token_hex(8)
    return [{**body, "cache_salt": salt} for body in bodies]


async def answer_of(http: httpx.AsyncClient, body: dict[str, Any]) -> Answer | BrokenStreamError:
    try:
        return await ask(http, body)
    except BrokenStreamError as error:
        return error


def _state(pid: int) -> str:
    """Its letter in /proc; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def handover_lab(
    folder: Path,
    *args: str,
    instances: str = "prefill:1,decode:1",
    pace_ms: float = 0.0,
    proxied: bool = False,
    **settings: Any,
) -> Iterator[HandoverLab]:
    """`xllm serve *args` over engines with roles; `settings` are configuration fields by name.

    `proxied`: they reach each other through `proxies`. One that is started again takes no new proxy.
    """
    points = folder / "points"
    points.mkdir(exist_ok=True)
    env = environment(pace_ms, max_queue_delay_s=0, **settings)
    env |= {"HANDOVERLAB_DIR": str(points), "HANDOVERLAB_ROW_MS": str(ROW_MS)}
    num_engines = sum(int(part.partition(":")[2]) for part in instances.split(","))
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(_proxy(points)) for _ in range(num_engines * proxied)]
        server = stack.enter_context(serve(*args, "--instances", instances, env=env))
        faults.wait_ready(server.base_url, num_engines)
        yield HandoverLab(server, points, num_engines, tuple(proxies))


@contextlib.contextmanager
def _proxy(folder: Path) -> Iterator[TcpProxy]:
    """Where it goes to is written into its file by the engine that takes it."""
    with TcpProxy(lambda: int((folder / f"taken.{made.port}").read_text())) as made:
        (folder / f"proxy.{made.port}").touch()
        yield made
