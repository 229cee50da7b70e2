"""Random moves between engines that crash, hang, refuse, leave and lie: every request ends once, and right.

The front is real, the engines say a script; time is the test's.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.null.service.conftest import ASSETS, House
from tests.null.service.test_failover_property import ACTIONS, World, check, script
from xllm.config import FrontConfig
from xllm.errors import ErrorInfo
from xllm.service.front import Front
from xllm.service.instances.about import InstanceAbout
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.wire.messages import Moved

MOVES = "move move move silent silent talk talk fail succeed lie leave".split()
NO_ROOM = ErrorInfo(kind="UnavailableError", code="no_room", message="no pages are free")


def by_lot(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
    """Prefill on any, decode on any or nowhere in particular; the same for the same request."""
    names = [i.name for i in snapshot.instances]
    lot = zlib.crc32(f"{request.request_id}/{request.attempt}".encode())
    decode = [*names, None][lot // 16 % (len(names) + 1)]
    return Placement(instance=names[lot % len(names)], decode=decode, reasons=("lot",))


@dataclass
class MovingWorld(World):
    async def add(self, name: str) -> None:
        if name in self.alive:
            return
        card = sample_card(ASSETS)
        engine = SampleEngine(card, ASSETS, script=script, auto=False)
        self.house.engines.append(engine)
        await self.settle()
        about = InstanceAbout(pulses=True, endpoints=("tcp:127.0.0.1:9",))
        await self.house.front.add_instance(engine.stream, card, name=name, about=about)
        self.alive[name] = engine

    async def act(self, action: str, pick: int) -> None:
        if action not in MOVES:
            await super().act(action, pick)
            return
        names = sorted(self.alive)
        if not names:
            return
        name = names[pick % len(names)]
        engine = self.alive[name]
        if action == "move" and self.readers:
            live = self.readers[pick % len(self.readers)][0]
            self.house.front._dispatch.move(live.request_id, name)
        elif action in ("silent", "talk"):
            engine.hands_over = action == "talk"
        elif action in ("fail", "succeed"):
            engine.move_error = NO_ROOM if action == "fail" else None
        elif action == "lie" and self.readers:
            live = self.readers[pick % len(self.readers)][0]
            # Of a transfer that nobody ordered. A request that is there will hold as its engine says.
            for attempt in (live.journal.attempt, live.journal.attempt - 1):
                if (request := engine._requests.get(live.request_id)) and request.spec.attempt == attempt:
                    request.holds = True
                engine.tell(Moved(request_id=live.request_id, attempt=max(0, attempt), transfer_id="lie"))
        elif action == "leave":
            await self.leave(name)

    async def leave(self, name: str) -> None:
        """As an instance that is restarted: it moves what it can within its time."""
        front, engine = self.house.front, self.alive[name]
        drained = asyncio.create_task(front.drain_instance(name, 1.0))
        for _ in range(12):
            if drained.done():
                break
            if name not in self.frozen:
                for other in {engine, *self.alive.values()} - {self.alive.get(n) for n in self.frozen}:
                    other.step()  # type: ignore[union-attr]
            await self.wait(0.4)
        await drained
        await front.remove_instance(name)
        self.gone(name)

    async def finish(self) -> None:
        for engine in self.alive.values():
            engine.hands_over, engine.move_error = True, None
        await super().finish()


async def play(actions: list[tuple[str, int]], mode: str) -> None:
    clock = FakeClock()
    config = FrontConfig(recovery_grace_s=1000.0, transfer_mode=mode)  # type: ignore[arg-type]
    world = MovingWorld(House(clock=clock, front=Front(config, by_lot, clock)))
    for name in ("engine-0", "engine-1", "engine-2"):
        await world.add(name)
    for action, pick in actions:
        await world.act(action, pick)
        await world.settle()
        for instance in world.house.front._catalogue.instances():
            assert not instance.requests & instance.kept
            assert set(instance.inbound) <= set(world.house.front._dispatch.tickets)
    await world.finish()
    await asyncio.gather(*(reader for _, reader in world.readers))
    await world.settle()
    check(world)
    front = world.house.front
    assert front.snapshot().num_moving == 0
    assert not front._moves._kept
    for instance in front._catalogue.instances():
        assert not instance.inbound
        assert not instance.kept
    await front.close()
    for engine in world.house.engines:
        await engine.close()
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, left


@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(
        st.tuples(st.sampled_from([*ACTIONS, *MOVES]), st.integers(0, 11)), min_size=5, max_size=50
    ),
    mode=st.sampled_from(["push", "pull"]),
)
def test_whatever_happens_to_moves_every_request_ends_once_with_its_own_tokens(
    actions: list[tuple[str, int]], mode: str
) -> None:
    asyncio.run(play(actions, mode))
