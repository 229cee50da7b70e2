"""Signals of a command that runs until it is told to end: once = in order, twice = now.

SIGHUP ends it when its terminal was closed, and means nothing otherwise: there is nothing to read anew.
SIGQUIT stays what it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
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

    def on_hang_up() -> None:
        if had_terminal and not os.isatty(sys.stderr.fileno()):
            on_signal()

    had_terminal = sys.stderr.isatty()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, on_hang_up)
    try:
        return await running
    except asyncio.CancelledError:
        say("stopped at once")
        return STOPPED_AT_ONCE
