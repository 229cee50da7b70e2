"""SIGTERM and Ctrl-C for a command that runs until it is told to end: once = in order, twice = now."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

STOPPED_AT_ONCE = 130


async def until_signal(work: Callable[[asyncio.Event], Awaitable[int]], say: Callable[[str], None]) -> int:
    """The exit status of `work`, whose event is set by the first signal; the second one cancels it."""
    stop = asyncio.Event()
    running = asyncio.ensure_future(work(stop))

    def on_signal() -> None:
        if stop.is_set():
            running.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        return await running
    except asyncio.CancelledError:
        say("stopped at once")
        return STOPPED_AT_ONCE
