"""Server-sent events: how one is written, and what keeps a quiet stream alive.

When a stream begins, goes on and fails is `openai/streaming`; what events say is their makers' matter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import msgspec

from xllm.api.http import Reply

KEEP_ALIVE_S = 15.0

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One event. JSON escapes newlines, so no text of a model can end an event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class TextEvent:
    """Events that differ in one text only: encoded once around it, so that a token costs its own text.

    `make(text)` is the event's value; it is called once, and what stands after the text in it must not
    hold a NUL character.
    """

    def __init__(self, make: Callable[[str], object]) -> None:
        self._before, _, self._after = event(make("\0")).rpartition(b'"\\u0000"')

    def __call__(self, text: str) -> bytes:
        return self._before + msgspec.json.encode(text) + self._after


@contextlib.contextmanager
def heartbeat(reply: Reply) -> Iterator[None]:
    """Comments keep proxies from closing a quiet stream and show us a client that vanished."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def wait() -> None:
        nonlocal timer
        timer = loop.call_later(KEEP_ALIVE_S, beat)

    def beat() -> None:
        reply.probe()
        wait()

    wait()
    try:
        yield
    finally:
        timer.cancel()
