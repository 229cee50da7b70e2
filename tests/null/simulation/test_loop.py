"""The virtual loop: time jumps, never passes; what waits for ever is an error that says who waits."""

from __future__ import annotations

import asyncio
import time

import pytest

from xllm.simulation.clock import VirtualClock
from xllm.simulation.link import BUFFER_BYTES, connect
from xllm.simulation.loop import StuckError, run_virtual
from xllm.types import EngineSnapshot
from xllm.wire.messages import Abort, Stats


def test_ten_days_pass_in_a_moment() -> None:
    async def main() -> float:
        clock = VirtualClock(asyncio.get_running_loop())
        begun_s = clock.monotonic_s()
        await asyncio.sleep(10 * 86_400)
        return clock.monotonic_s() - begun_s

    begun_s = time.monotonic()
    assert run_virtual(main()) == pytest.approx(10 * 86_400)
    assert time.monotonic() - begun_s < 60


def test_timers_fire_in_order_and_at_their_time() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        begun_s, seen = loop.time(), []

        async def note(name: str, after_s: float) -> None:
            await asyncio.sleep(after_s)
            seen.append((name, round(loop.time() - begun_s, 6)))

        await asyncio.gather(note("b", 0.2), note("a", 0.1), note("c", 0.2))
        return seen

    assert run_virtual(main()) == [("a", 0.1), ("b", 0.2), ("c", 0.2)]


def test_waiting_for_nothing_is_an_error_that_names_the_task() -> None:
    async def main() -> None:
        waiting = asyncio.create_task(asyncio.Event().wait(), name="the forgotten one")
        await waiting

    with pytest.raises(StuckError, match="the forgotten one at Event.wait"):
        run_virtual(main())


def test_spinning_at_one_instant_is_an_error() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(StuckError, match="spins"):
        run_virtual(main())


def test_work_for_a_thread_is_done_on_the_spot() -> None:
    async def main() -> tuple[int, type]:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(lambda: 42), type(asyncio.get_running_loop())

    assert run_virtual(main())[0] == 42


def test_setting_the_date_moves_no_duration() -> None:
    async def main() -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        wall_s, monotonic_s = clock.wall_s(), clock.monotonic_s()
        clock.jump_wall(-3600)
        assert clock.wall_s() == wall_s - 3600
        assert clock.monotonic_s() == monotonic_s

    run_virtual(main())


def stats(step: int) -> Stats:
    return Stats(snapshot=EngineSnapshot(step=step))


def test_a_message_takes_its_time_and_none_overtakes_another() -> None:
    async def main() -> list[tuple[float, int]]:
        loop = asyncio.get_running_loop()
        latencies = iter((0.5, 0.1, 0.1))
        front, engine = connect(loop, lambda: next(latencies))
        begun_s, seen = loop.time(), []
        for step in range(3):
            engine.send(stats(step))
        for _ in range(3):
            message = await front.receive()
            assert isinstance(message, Stats)
            seen.append((round(loop.time() - begun_s, 6), message.snapshot.step))
        return seen

    assert run_virtual(main()) == [(0.5, 0), (0.5, 1), (0.5, 2)]


def test_a_dead_process_has_said_what_it_wrote_and_a_cut_loses_it() -> None:
    async def main(how: str) -> list[object]:
        front, engine = connect(asyncio.get_running_loop(), lambda: 0.1)
        engine.send(stats(1))
        getattr(engine, how)()
        return [await front.receive(), await front.receive()]

    assert run_virtual(main("die")) == [stats(1), None]
    assert run_virtual(main("cut")) == [None, None]


def test_a_repeated_message_arrives_twice() -> None:
    async def main() -> list[object]:
        front, engine = connect(asyncio.get_running_loop(), lambda: 0.1)
        engine.outbound.num_to_repeat = 1
        engine.send(stats(1))
        engine.send(stats(2))
        return [await front.receive() for _ in range(3)]

    assert run_virtual(main()) == [stats(1), stats(1), stats(2)]


def test_who_writes_to_a_peer_that_does_not_read_waits() -> None:
    async def main() -> None:
        front, engine = connect(asyncio.get_running_loop(), lambda: 0.001)
        big = Abort(request_id="x" * BUFFER_BYTES)
        writer = asyncio.create_task(front.send(big))
        await asyncio.sleep(60)
        assert not writer.done()
        assert engine.take() == (True, big)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert writer.done()

    run_virtual(main())
