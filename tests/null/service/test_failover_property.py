"""Random crashes, hangs, zombies, refusals, drains and returns: every request ends once, and right.

The front is real, the engines say a script; time is the test's.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.null.service.conftest import ASSETS, House, outcome, tokens_of
from xllm.config import FrontConfig
from xllm.errors import CapacityError, ErrorInfo, UnavailableError, XllmError
from xllm.service.front import Front
from xllm.service.instances.about import InstanceAbout
from xllm.service.live import LiveRequest
from xllm.service.stream import Delta
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.types import RequestSpec
from xllm.wire.messages import Frame, Pulse

FULL = ErrorInfo(kind="CapacityError", code="queue_full", message="full", retry_after_s=1.0)
MAX_ENGINES = 3
LENGTH = 24

ACTIONS = (
    "submit submit submit2 step step step step crash garbage hang wake add add drain remove "
    "refuse accept abort wait"
).split()


def script(spec: RequestSpec, choice: int) -> tuple[int, ...]:
    """Tells requests and choices apart, so that a mix-up shows."""
    rng = random.Random(repr((spec.prompt_token_ids, choice)))
    return tuple(rng.randrange(3, 259) for _ in range(LENGTH))


@dataclass
class World:
    house: House
    alive: dict[str, SampleEngine] = field(default_factory=dict)
    frozen: dict[str, list[Frame]] = field(default_factory=dict)
    readers: list[tuple[LiveRequest, asyncio.Task[tuple[list[Delta], XllmError | None]]]] = field(
        default_factory=list
    )
    aborted: set[str] = field(default_factory=set)
    num_named: int = 0

    async def act(self, action: str, pick: int) -> None:
        names = sorted(self.alive)
        name = names[pick % len(names)] if names else ""
        engine = self.alive.get(name)
        if action == "add" and len(self.alive) < MAX_ENGINES:
            await self.add(f"engine-{pick % MAX_ENGINES}")
        elif action.startswith("submit"):
            await self.submit(2 if action == "submit2" else 1)
        elif action == "abort" and self.readers:
            live = self.readers[pick % len(self.readers)][0]
            if await self.house.front.abort(live.request_id):
                self.aborted.add(live.request_id)
        elif action == "wait":
            await self.wait(1.0)
        elif engine is None:
            return
        elif action == "step" and name not in self.frozen:
            for _ in range(1 + pick % 5):
                engine.step()
                await self.settle()
        elif action in ("crash", "garbage"):
            engine.send_garbage() if action == "garbage" else engine.crash()
            self.gone(name)
        elif action == "hang":
            self.frozen.setdefault(name, [engine_frame(engine, rid) for rid in engine.request_ids])
            await self.wait(2.6)
        elif action == "wake" and name in self.frozen:
            # What it had under way when it fell asleep. Lies, so they show unless they are dropped; what is
            # still its own (it woke before anybody noticed) it does not lie about.
            own = {(r.spec.request_id, r.spec.attempt) for r in engine._requests.values()}
            engine.say(*(f for f in self.frozen.pop(name) if (f.request_id, f.attempt) not in own))
        elif action == "refuse":
            engine.refusal = FULL
        elif action == "accept":
            engine.refusal = None
        elif action == "drain":
            await self.house.front.drain_instance(name, 0.0)
            await self.house.front.remove_instance(name)
            self.gone(name)
        elif action == "remove":
            await self.house.front.remove_instance(name)
            self.gone(name)

    async def add(self, name: str) -> None:
        if name in self.alive:
            return
        card = sample_card(ASSETS)
        engine = SampleEngine(card, ASSETS, script=script, auto=False)
        self.house.engines.append(engine)
        # The front may not have read the end of an earlier one of that name yet.
        await self.settle()
        about = InstanceAbout(pulses=True)
        await self.house.front.add_instance(engine.stream, card, name=name, about=about)
        self.alive[name] = engine

    def gone(self, name: str) -> None:
        self.alive.pop(name, None)
        self.frozen.pop(name, None)

    async def submit(self, n: int) -> None:
        self.num_named += 1
        try:
            live = await self.house.submit(
                f"request {self.num_named}", n=n, max_tokens=LENGTH, ignore_eos=True
            )
        except (CapacityError, UnavailableError):
            return
        self.readers.append((live, asyncio.create_task(outcome(live))))

    async def settle(self) -> None:
        for _ in range(12):
            await asyncio.sleep(0)

    async def wait(self, seconds: float) -> None:
        """Time passes; whoever is awake pulses."""
        for _ in range(round(seconds / 0.4)):
            for name, engine in self.alive.items():
                if name not in self.frozen:
                    engine.tell(Pulse(step=engine.num_steps))
            await self.settle()
            self.house.pass_time(0.4)
        await self.settle()
        for name in sorted(self.alive):
            # Cut off after a lasting suspicion.
            if self.alive[name].stream._link.closed:
                self.gone(name)

    async def finish(self) -> None:
        """One sound engine is enough for all to end."""
        for name in sorted(self.alive):
            self.alive[name].refusal = None
            if name in self.frozen:
                self.alive[name].crash()
                self.gone(name)
        await self.settle()
        if not self.alive:
            await self.add("last")
        for _ in range(2000):
            if all(live.ended for live, _ in self.readers):
                return
            if not any([engine.step() for engine in self.alive.values()]):
                await self.wait(0.4)
            await self.settle()
        raise AssertionError("a request never ended")


def engine_frame(engine: SampleEngine, request_id: str) -> Frame:
    request = engine._requests[request_id]
    offset = request.choices[0].num_out
    return Frame(request_id=request_id, attempt=request.spec.attempt, offset=offset, tokens=(7,))


def check(world: World) -> None:
    snapshot = world.house.front.snapshot()
    for live, reader in world.readers:
        deltas, error = reader.result()
        spec = live.journal.spec
        for choice in range(spec.params.n):
            said, whole = tokens_of(deltas, choice), script(spec, choice)
            assert said == whole[: len(said)], "a token was lost, repeated or made up"
            if error is None:
                assert said == whole
        ends = [d.choice for d in deltas if d.finish_reason is not None]
        assert len(ends) == len(set(ends))
        if error is None:
            assert len(ends) == spec.params.n
            assert live.usage().completion_tokens == LENGTH * spec.params.n
        elif error.code == "aborted":
            assert live.request_id in world.aborted
        elif error.code == "request_quarantined":
            assert sum(snapshot.num_deaths.values()) + snapshot.num_suspicions >= 4
        else:
            # Refused by all before it had begun anywhere, or nobody there for as long as the grace.
            assert error.code in ("queue_full", "no_healthy_instance")
    assert snapshot.num_accepted == sum(snapshot.num_ended.values()) == len(world.readers)
    assert snapshot.num_waiting == snapshot.num_inflight_reqs == snapshot.num_inflight_tokens == 0
    for name, engine in world.alive.items():
        assert engine.request_ids == (), f"{name} works on what is nobody's"
    for instance in snapshot.instances:
        assert (instance.num_requests, instance.backlog_tokens, instance.context_tokens) == (0, 0, 0)


async def play(actions: list[tuple[str, int]], max_resumes: int) -> None:
    clock = FakeClock()
    config = FrontConfig(max_resumes=max_resumes, recovery_grace_s=1000.0)
    world = World(House(clock=clock, front=Front(config, None, clock)))
    await world.add("engine-0")
    await world.add("engine-1")
    for action, pick in actions:
        await world.act(action, pick)
        await world.settle()
    await world.finish()
    await asyncio.gather(*(reader for _, reader in world.readers))
    await world.settle()
    check(world)
    await world.house.front.close()
    for engine in world.house.engines:
        await engine.close()
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, left


@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 11)), min_size=5, max_size=40),
    max_resumes=st.integers(1, 3),
)
def test_whatever_happens_every_request_ends_once_with_its_own_tokens(
    actions: list[tuple[str, int]], max_resumes: int
) -> None:
    asyncio.run(play(actions, max_resumes))
