"""Server-sent events over a Reply: when a stream may begin, how it goes on, how it fails.

No 200 before the first event is known or has been awaited for a moment: errors that show at once
get their own status. Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from xllm.api.error_map import error_reply
from xllm.api.http import Reply

PEEK_S = 1.0
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


async def send_events(
    reply: Reply, events: AsyncIterator[bytes], headers: Iterable[tuple[str, str]] = ()
) -> None:
    """Send `events` and `[DONE]`. A failure after the head becomes an error event, without `[DONE]`.

    Raises what `events` raises before the head is sent.
    """
    first = asyncio.ensure_future(anext(events, None))
    heartbeat: asyncio.Task[None] | None = None
    try:
        await asyncio.wait({first}, timeout=PEEK_S)
        if first.done():
            first.result()
        reply.start(200, "text/event-stream; charset=utf-8", [("cache-control", "no-store"), *headers])
        heartbeat = asyncio.create_task(_heartbeat(reply))
        await _send_all(reply, first, events)
    finally:
        first.cancel()
        if heartbeat is not None:
            heartbeat.cancel()


async def _send_all(reply: Reply, first: asyncio.Future[bytes | None], events: AsyncIterator[bytes]) -> None:
    try:
        data = await first
        while data is not None:
            await reply.write(data)
            data = await anext(events, None)
        await reply.write(DONE)
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001  any failure must end the stream as an event
        reply.keep_alive = False
        await reply.write(event(error_reply(error, reply.request_id).envelope))
    await reply.end()


async def _heartbeat(reply: Reply) -> None:
    # Comments keep proxies from closing a quiet stream and show us a client that vanished.
    while True:
        await asyncio.sleep(KEEP_ALIVE_S)
        reply.probe()
