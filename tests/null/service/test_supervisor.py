"""The supervisor over engines in memory and a fake clock: who is started when, proved, killed, replaced."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from xllm.config import EngineConfig, FrontConfig, ModelConfig
from xllm.errors import ConfigError, InternalError, UnavailableError
from xllm.service.instances.supervisor import Supervisor
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine, Script, echo, sample_card
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.types import ModelCard
from xllm.wire.messages import Submit
from xllm.wire.stream import EngineStream

ASSETS = tiny_assets(512)


class FakeProcess:
    """What the supervisor needs of a `LocalEngine`, around a `SampleEngine`."""

    next_pid = 1000

    def __init__(self, engine: SampleEngine) -> None:
        self.engine = engine
        self.stream: EngineStream = engine.stream
        self.card = engine.card
        self.max_reqs = 8
        self.pulses = True
        self.incarnation = "life"
        self.endpoints = ("tcp:127.0.0.1:1",)
        self.silent = False
        self.report = ()
        self.exit_code: int | None = None
        FakeProcess.next_pid += 1
        self.pid = FakeProcess.next_pid

    async def terminate(self, drain_s: float = 0.0) -> int:
        self.exit_code = 0 if self.exit_code is None else self.exit_code
        await self.engine.close()
        return self.exit_code

    def cause(self) -> str:
        return "crash"

    def kill(self) -> None:
        self.exit_code = -9
        self.engine.crash()


class FakeFront:
    """Keeps who was added; a test takes the place of the reading side."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.more: dict[str, Any] = {}
        self.instances: dict[str, SimpleNamespace] = {}
        self.refuses: Exception | None = None
        self.news = asyncio.Condition()

    def prepare_text(self, assets: dict[str, bytes]) -> None:
        raise AssertionError("no engine here sends assets early")

    async def add_instance(
        self, stream: EngineStream, card: ModelCard, *, name: str, max_reqs: int | None, **more: Any
    ) -> SimpleNamespace:
        if self.refuses is not None:
            raise self.refuses
        self.more[name] = more
        await self.note("add", name)
        return self.instances.setdefault(name, SimpleNamespace(ended_receiving=False))

    async def drain_instance(self, name: str, grace_s: float) -> object:
        await self.note("drain", name)
        return None

    async def remove_instance(self, name: str) -> object:
        await self.note("remove", name)
        return None

    async def note(self, what: str, name: str) -> None:
        async with self.news:
            self.log.append((what, name))
            self.news.notify_all()

    async def saw(self, what: str, name: str, count: int = 1) -> None:
        async with self.news:
            await self.news.wait_for(lambda: self.log.count((what, name)) >= count)


class House:
    """A supervisor with everything around it in a test's hands."""

    def __init__(self, num_engines: int = 1) -> None:
        self.front = FakeFront()
        self.clock = FakeClock()
        self.processes: list[FakeProcess] = []
        self.fds: list[int | None] = []
        self.files: list[int] = []
        self.delays: list[float] = []
        self.failures: list[Exception] = []
        self.script: Script = echo
        self.auto = True
        self.blocked = asyncio.Event()
        self.blocked.set()
        self.supervisor = Supervisor(
            self.front,
            [EngineConfig(model=ModelConfig(model="sample"))] * num_engines,
            FrontConfig(start_timeout_s=0.5),
            self.clock,
            launch=self.launch,
            sleep=self.sleep,
        )

    async def launch(self, config: EngineConfig, *rest: object, **more: Any) -> Any:
        self.fds.append(more["pages_fd"])
        self.files.append(os.fstat(more["pages_fd"]).st_ino)
        await self.blocked.wait()
        if self.failures:
            raise self.failures.pop(0)
        card = sample_card(ASSETS, model_id=config.model.model)
        engine = SampleEngine(card, ASSETS, script=self.script, auto=self.auto)
        self.processes.append(FakeProcess(engine))
        return self.processes[-1]

    async def sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        self.clock.advance(seconds)
        await asyncio.sleep(0)

    def lose(self, name: str, process: FakeProcess, code: int = -11) -> None:
        process.exit_code = code
        process.engine.crash()
        self.front.more[name]["on_lost"]()


@pytest.fixture
def house() -> House:
    return House()


async def test_an_engine_answers_one_request_before_it_is_added(house: House) -> None:
    await house.supervisor.start()
    (process,) = house.processes
    asked = [m for m in process.engine.received if isinstance(m, Submit)]
    assert len(asked) == 1
    assert asked[0].spec.params.max_tokens == 1
    assert asked[0].spec.params.skip_reading_prefix_cache
    assert house.front.log == [("add", "engine-0")]
    await house.supervisor.close()


async def test_a_lost_engine_comes_back_at_once_and_keeps_name_and_pages(house: House) -> None:
    await house.supervisor.start()
    house.lose("engine-0", house.processes[0])
    await house.front.saw("add", "engine-0", 2)
    assert house.delays == [0]
    assert len(set(house.fds)) == 1
    assert house.fds[0] is not None
    assert house.processes[1].pid != house.processes[0].pid
    await house.supervisor.close()
    assert [p.exit_code for p in house.processes] == [-11, 0]


async def test_an_engine_that_dies_at_every_start_is_never_added_and_started_ever_less_often(
    house: House,
) -> None:
    await house.supervisor.start()
    house.failures = [UnavailableError("dies at start")] * 6
    house.lose("engine-0", house.processes[0])
    await house.front.saw("add", "engine-0", 2)
    assert house.delays == [0, 1, 2, 4, 8, 16, 30]
    assert len(house.processes) == 2
    await house.supervisor.close()


async def test_an_engine_that_answers_otherwise_than_its_class_is_refused_and_its_pages_dropped(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    await house.supervisor.start()
    house.script = lambda spec, choice: (499,)
    refused = asyncio.Event()
    house.supervisor._sleep = lambda seconds: _after(refused, house, seconds)
    house.lose("engine-0", house.processes[0])
    await refused.wait()
    assert house.front.log == [("add", "engine-0")]
    assert house.processes[1].exit_code == 0
    assert "corrupt" in caplog.text
    house.script = echo
    await house.front.saw("add", "engine-0", 2)
    await house.supervisor.close()


async def _after(refused: asyncio.Event, house: House, seconds: float) -> None:
    await house.sleep(seconds)
    if len(house.processes) == 2 and house.processes[1].exit_code is not None:
        refused.set()


async def test_an_engine_that_does_not_answer_its_first_request_is_refused(house: House) -> None:
    house.auto = False
    with pytest.raises(UnavailableError) as silent:
        await house.supervisor.start()
    assert silent.value.code == "canary_timeout"
    assert house.processes[0].exit_code == 0
    await house.supervisor.close()


async def test_what_the_first_engine_refuses_is_raised_and_nothing_left(house: House) -> None:
    house.failures = [ConfigError("no such model")]
    with pytest.raises(ConfigError, match="no such model"):
        await house.supervisor.start()
    await house.supervisor.close()
    assert house.processes == []


async def test_an_engine_that_the_front_cannot_take_is_ended(house: House) -> None:
    house.front.refuses = InternalError("no")
    with pytest.raises(InternalError):
        await house.supervisor.start()
    assert house.processes[0].exit_code == 0
    await house.supervisor.close()


async def test_the_first_engine_opens_the_house_and_the_others_follow_one_by_one() -> None:
    house = House(3)
    await house.supervisor.start()
    house.blocked.clear()
    assert house.front.log == [("add", "engine-0")]
    house.failures = [ConfigError("no memory left")]
    house.blocked.set()
    await house.supervisor.all_tried()
    await house.front.saw("add", "engine-1")
    await house.front.saw("add", "engine-2")
    assert house.delays == [0]
    assert len(set(house.fds)) == 3
    await house.supervisor.close()


@pytest.mark.parametrize("receiving", [False, True])
async def test_memory_that_a_peer_may_still_write_is_not_used_again(house: House, receiving: bool) -> None:
    await house.supervisor.start()
    house.front.instances["engine-0"].ended_receiving = receiving
    house.lose("engine-0", house.processes[0])
    await house.front.saw("add", "engine-0", 2)
    assert (house.files[0] != house.files[1]) is receiving
    await house.supervisor.close()


async def test_the_front_is_told_how_to_kill_a_silent_engine_and_what_it_died_of(house: House) -> None:
    await house.supervisor.start()
    more = house.front.more["engine-0"]
    assert (more["about"].pid, more["about"].num_restarts) == (house.processes[0].pid, 0)
    assert more["about"].pulses
    assert more["cause_of"]() == "crash"
    more["on_hung"]()
    assert house.processes[0].exit_code == -9
    more["on_lost"]()
    await house.front.saw("add", "engine-0", 2)
    assert house.front.more["engine-0"]["about"].num_restarts == 1
    await house.supervisor.close()


async def test_a_rolling_restart_replaces_one_engine_after_the_other_without_any_delay() -> None:
    house = House(2)
    await house.supervisor.start()
    await house.supervisor.all_tried()
    before = list(house.processes)
    await house.supervisor.rolling_restart()
    steps = [[(what, name) for what in ("drain", "remove", "add")] for name in ("engine-0", "engine-1")]
    assert house.front.log[2:] == steps[0] + steps[1]
    assert house.delays == []
    assert all(p.exit_code == 0 for p in before)
    assert all(p.exit_code is None for p in house.processes[2:])
    await house.supervisor.close()


async def test_an_only_engine_goes_when_a_successor_takes_requests(house: House) -> None:
    await house.supervisor.start()
    await house.supervisor.rolling_restart()
    old, successor = house.processes
    steps = [("add", "engine-0"), ("add", "engine-1"), ("drain", "engine-0"), ("remove", "engine-0")]
    assert house.front.log == steps
    assert (old.exit_code, successor.exit_code) == (0, None)
    assert house.fds[0] != house.fds[1]
    house.lose("engine-1", successor)
    await house.front.saw("add", "engine-1", 2)
    assert house.fds[2] == house.fds[1]
    await house.supervisor.rolling_restart()
    assert house.front.log[-3:] == [("add", "engine-0"), ("drain", "engine-1"), ("remove", "engine-1")]
    assert len([p for p in house.processes if p.exit_code is None]) == 1
    await house.supervisor.close()
    assert all(p.exit_code is not None for p in house.processes)


async def test_an_only_engine_is_restarted_in_place_where_no_second_one_fits(house: House) -> None:
    await house.supervisor.start()
    house.failures = [ConfigError("KV cache: 12 pages take 3 MiB, but only 2 MiB are free")]
    await house.supervisor.rolling_restart()
    assert house.front.log == [(what, "engine-0") for what in ("add", "drain", "remove", "add")]
    assert house.fds[2] == house.fds[0]
    assert house.delays == []
    await house.supervisor.close()


async def test_an_only_engine_that_dies_while_its_successor_loads_leaves_one_engine(house: House) -> None:
    await house.supervisor.start()
    house.blocked.clear()
    rolling = asyncio.create_task(house.supervisor.rolling_restart())
    while len(house.fds) < 2:
        await asyncio.sleep(0)
    house.lose("engine-0", house.processes[0])
    while len(house.fds) < 3:
        await asyncio.sleep(0)
    house.blocked.set()
    await rolling
    assert [slot.name for slot in house.supervisor.slots] == ["engine-1"]
    assert len([p for p in house.processes if p.exit_code is None]) == 1
    await house.supervisor.close()


async def test_nothing_is_started_once_the_house_is_closed(house: House) -> None:
    await house.supervisor.start()
    house.blocked.clear()
    house.lose("engine-0", house.processes[0])
    while len(house.fds) < 2:
        await asyncio.sleep(0)
    await house.supervisor.close()
    house.blocked.set()
    await asyncio.sleep(0)
    assert len(house.processes) == 1
