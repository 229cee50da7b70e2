"""A simulated engine's faults do what their names say; without that the schedules would prove little."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from xllm.clock import Clock
from xllm.config import EngineConfig
from xllm.engine.plan import StepPlan
from xllm.service.instances.handshake import start_engine
from xllm.simulation.clock import VirtualClock
from xllm.simulation.device import Draws, build_device
from xllm.simulation.engine import SimEngine
from xllm.simulation.link import SimStream
from xllm.simulation.loop import run_virtual
from xllm.types import RequestSpec, SamplingParams, TokenSegment
from xllm.wire.messages import EngineMessage, Frames, KvDelta, Pulse, Stats, Submit

LATENCY_S = 0.001


class Bench:
    """An engine that has said Ready, and everything it says afterwards with the time of its arrival."""

    def __init__(self, engine: SimEngine, stream: SimStream) -> None:
        self.engine = engine
        self.stream = stream
        self.heard: list[tuple[float, EngineMessage]] = []
        self.eof_s: float | None = None
        self._loop = asyncio.get_running_loop()
        self._reader = self._loop.create_task(self._read())

    async def submit(self, num_tokens: int = 200) -> None:
        params = SamplingParams(max_tokens=num_tokens, seed=1, temperature=0.0, ignore_eos=True)
        segments = (TokenSegment((5, 6, 7)),)
        await self.stream.send(
            Submit(spec=RequestSpec(request_id="a", model="simulated", segments=segments, params=params))
        )

    def since(self, start_s: float, kind: type) -> list[EngineMessage]:
        return [m for at_s, m in self.heard if at_s >= start_s and isinstance(m, kind)]

    def now_s(self) -> float:
        return self._loop.time()

    async def _read(self) -> None:
        while (message := await self.stream.receive()) is not None:
            self.heard.append((self._loop.time(), message))
        self.eof_s = self._loop.time()

    async def close(self) -> None:
        await self.stream.close()
        await asyncio.wait([self._reader])
        self.engine.shut_down()
        await self.engine.ended()


def on_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        clock: Clock = VirtualClock(asyncio.get_running_loop())
        device = build_device(clock, Draws(), num_pages=16)
        engine = SimEngine("engine", device, lambda: LATENCY_S, server=False)
        stream = engine.connect()
        await start_engine(stream, EngineConfig(), timeout_s=5)
        bench = Bench(engine, stream)
        await test(bench)
        await bench.close()
        assert engine.failure is None

    run_virtual(main())


def tokens(messages: list[EngineMessage]) -> int:
    return sum(len(f.tokens) for m in messages if isinstance(m, Frames) for f in m.frames)


def test_an_idle_engine_says_so_and_what_pages_it_has() -> None:
    async def test(bench: Bench) -> None:
        await asyncio.sleep(5)
        assert [m.reset for m in bench.since(0, KvDelta) if isinstance(m, KvDelta)] == [True]
        assert len(bench.since(0, Pulse)) == 9
        assert len(bench.since(0, Stats)) == 4
        assert not any(m.busy for m in bench.since(0, Pulse) if isinstance(m, Pulse))

    on_bench(test)


def test_a_step_takes_the_time_of_its_cost() -> None:
    async def test(bench: Bench) -> None:
        begun_s = bench.now_s()
        await bench.submit(num_tokens=1)
        await asyncio.sleep(1)
        at_s = next(at_s for at_s, m in bench.heard if isinstance(m, Frames))
        took_ms = (at_s - begun_s - 2 * LATENCY_S) * 1000
        # Three rows of prefill by SMOLLM2_ON_TWO_CORES.
        assert abs(took_ms - (2.0 + 3 * 0.1 + 6 * 0.0002)) < 0.001

    on_bench(test)


def test_a_crash_in_a_step_takes_its_tokens_along() -> None:
    async def test(bench: Bench) -> None:
        executor = bench.engine.device.executor
        submit, drawn = executor.submit, 0

        def counted(plan: StepPlan) -> None:
            nonlocal drawn
            drawn += len(plan.sequences)
            submit(plan)

        executor.submit = counted
        await bench.submit()
        await asyncio.sleep(0.0194)
        said = tokens(bench.since(0, Frames))
        bench.engine.crash()
        await asyncio.sleep(1)
        assert tokens(bench.since(0, Frames)) < drawn
        assert tokens(bench.since(0, Frames)) <= said + 1
        assert bench.eof_s is not None
        assert not bench.engine.alive

    on_bench(test)


def test_a_stopped_process_is_silent_and_goes_on_where_it_was() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit()
        await asyncio.sleep(0.02)
        bench.engine.stop()
        await asyncio.sleep(0.01)
        stopped_s = bench.now_s()
        await asyncio.sleep(30)
        assert not bench.since(stopped_s, object)
        assert bench.eof_s is None
        bench.engine.resume()
        await asyncio.sleep(1)
        assert tokens(bench.since(0, Frames)) == 16  # the credit window: nothing was committed
        assert bench.since(stopped_s, Pulse)

    on_bench(test)


def test_a_hung_step_leaves_the_pulses_which_show_no_progress() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit()
        await asyncio.sleep(0.02)
        bench.engine.hang_device()
        await asyncio.sleep(0.5)
        hung_s = bench.now_s()
        await asyncio.sleep(10)
        pulses = [m for m in bench.since(hung_s, Pulse) if isinstance(m, Pulse)]
        assert len(pulses) == 20
        assert len({p.step for p in pulses}) == 1
        assert all(p.busy for p in pulses)
        assert pulses[-1].step_age_ms > 9000
        assert not bench.since(hung_s, Frames)
        bench.engine.release_device()
        await asyncio.sleep(0.5)
        assert bench.since(hung_s, Frames)

    on_bench(test)


def test_a_slow_engine_takes_so_many_times_as_long() -> None:
    spans: list[float] = []

    def slowed(factor: float) -> Callable[[Bench], Awaitable[None]]:
        async def test(bench: Bench) -> None:
            bench.engine.slow_down(factor)
            await bench.submit(num_tokens=10)
            await asyncio.sleep(60)
            times = [at_s for at_s, m in bench.heard if isinstance(m, Frames)]
            spans.append(times[-1] - times[0])

        return test

    on_bench(slowed(1.0))
    on_bench(slowed(20.0))
    assert abs(spans[1] / spans[0] - 20.0) < 0.01


def test_a_drain_finishes_what_runs_and_ends_the_process() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit(num_tokens=10)
        await asyncio.sleep(0.01)
        bench.engine.drain()
        await asyncio.sleep(5)
        assert tokens(bench.since(0, Frames)) == 10
        assert bench.engine.exited_in_order
        assert bench.eof_s is not None

    on_bench(test)
