"""A prefill and a decode instance behind a front whose router always names both."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.null.service.conftest import House, turns
from xllm.config import FrontConfig
from xllm.service.front import Front
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceAbout
from xllm.service.live import LiveRequest
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.snapshot import NullObserver
from xllm.testing.fake_engine import SampleEngine
from xllm.types import RequestSpec
from xllm.wire.messages import FrontMessage, Submit

TELLS_ENDPOINTS = InstanceAbout(endpoints=("unix:/run/p", "tcp:127.0.0.1:9"))


def split(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    """Prefill on the first name that begins with p, decode on the first with d; without either: where there
    is room."""
    names = [i.name for i in snapshot.instances if i.has_room]
    if not names:
        return None
    prefill = next((n for n in names if n.startswith("p")), names[0])
    decode = next((n for n in names if n.startswith("d")), None)
    return Placement(instance=prefill, decode=decode, reasons=("test",))


@dataclass
class Watcher(NullObserver):
    records: list[HandoverRecord] = field(default_factory=list)
    placed: list[tuple[str, int]] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)

    def on_handover(self, record: HandoverRecord) -> None:
        self.records.append(record)

    def on_placed(self, request_id: str, placement: Placement, attempt: int) -> None:
        self.placed.append((placement.instance, attempt))

    def on_moved(self, request_id: str, source: str, target: str, cause: str, *rest: object) -> None:
        self.moved.append(cause)

    def on_resumed(self, request_id: str, instance: str, gap_s: float) -> None:
        self.resumed.append(instance)

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        return [(r.outcome, r.code) for r in self.records]


@dataclass
class Pair:
    """`p` computes prompts, `d` goes on; both step by hand and tell where pages may be brought."""

    house: House
    watcher: Watcher
    p: SampleEngine
    d: SampleEngine

    async def started(self, num_tokens: int = 0, **params: Any) -> LiveRequest:
        """A request that is on p with so many tokens in the log."""
        num_before = len(submits(self.p))
        stream = await self.house.submit(**params)
        await self.p.saw(Submit, num_before + 1)
        await advance(self.p, stream, num_tokens)
        return stream

    async def more(self, name: str, **how: Any) -> SampleEngine:
        how.setdefault("auto", False)
        return await self.house.engine(name=name, join={"about": TELLS_ENDPOINTS}, **how)


async def make_pair(house: House, *, script: Any = None, pulses: bool = False, **config: Any) -> Pair:
    watcher = Watcher()
    house.front = Front(FrontConfig(**config), split, house.clock, observer=watcher)
    how = {"auto": False} if script is None else {"auto": False, "script": script}
    join = {"about": replace(TELLS_ENDPOINTS, pulses=pulses)}
    p = await house.engine(name="p", join=join, **how)
    d = await house.engine(name="d", join=join, **how)
    return Pair(house, watcher, p, d)


@pytest.fixture(params=["push", "pull"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def submits(engine: SampleEngine) -> list[Submit]:
    return [m for m in engine.received if isinstance(m, Submit)]


def specs(engine: SampleEngine) -> list[RequestSpec]:
    return [m.spec for m in submits(engine)]


def kinds(engine: SampleEngine, *only: type[FrontMessage]) -> list[str]:
    return [type(m).__name__ for m in engine.received if isinstance(m, only)]


async def advance(engine: SampleEngine, stream: LiveRequest, num_tokens: int) -> None:
    """Until so many tokens are in the log; the engine may have to wait for credit."""
    while stream.journal.num_committed < num_tokens:
        before = stream.journal.num_committed
        await turns(engine.step)
        await turns(lambda: stream.journal.num_committed > before)  # noqa: B023  awaited at once


async def finish(*engines: SampleEngine, streams: tuple[LiveRequest, ...]) -> None:
    """Step all by hand until the streams have ended."""
    for _ in range(10_000):
        if all(s.ended for s in streams):
            return
        for engine in engines:
            engine.step()
        await asyncio.sleep(0)
    raise AssertionError("a request never ended")
