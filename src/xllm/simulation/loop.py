"""An asyncio event loop whose clock is virtual: it never sleeps, it jumps to the next timer.

One thread, no sockets, no real time. What would wait for ever is an error that names the waiting
tasks, and so is a loop that spins without its clock moving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

MAX_TURNS_AT_ONE_TIME = 20_000
"""Beyond it nobody waits for time any more: a live-lock."""

RESOLUTION_S = 1e-9
"""Timers may fire this early. Far below any delay that is simulated, far above a float's rounding."""


class StuckError(RuntimeError):
    """Nothing can happen any more, or things happen without end at one instant."""


class _Selector:
    """In the place of a real selector: instead of blocking it moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._num_turns = 0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise StuckError(f"nothing is scheduled and nothing can happen; waiting: {_waiting(self._loop)}")
        if timeout > 0:
            self._loop.advance(timeout)
            self._num_turns = 0
        else:
            self._num_turns += 1
            if self._num_turns > MAX_TURNS_AT_ONE_TIME:
                raise StuckError(f"the loop spins at one instant; waiting: {_waiting(self._loop)}")
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Timers are exact, callbacks of one instant run in the order they were scheduled.

    Work given to an executor runs at once and on the spot: in a simulation it takes no time, and
    a thread would bring back the order of the real world.
    """

    def __init__(self, start_s: float = 1000.0) -> None:
        super().__init__()
        self._now_s = start_s
        self._selector = _Selector(self)
        self._clock_resolution = RESOLUTION_S

    def time(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Called by the selector only."""
        self._now_s += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed on to whoever awaits it, as an executor does
            future.set_exception(error)
        return future

    # What BaseEventLoop leaves to its subclasses. There are no file descriptors and no other threads.

    def _process_events(self, event_list: list[Any]) -> None:
        return

    def _write_to_self(self) -> None:
        return


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a fresh VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def _waiting(loop: asyncio.AbstractEventLoop) -> str:
    places = []
    for task in asyncio.all_tasks(loop):
        stack = task.get_stack(limit=1)
        place = f"{stack[-1].f_code.co_qualname}:{stack[-1].f_lineno}" if stack else "?"
        places.append(f"{task.get_name()} at {place}")
    return "; ".join(sorted(places)) or "no task"
