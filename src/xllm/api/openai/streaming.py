"""A batch's output to its client as events: when the stream may begin, how it goes on, how it fails.

No 200 before the first event is known or has been awaited for a moment: errors that show at once get their
own status. What events say is the form's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Protocol

from xllm.api.error_map import error_reply
from xllm.api.http import Reply
from xllm.api.openai.batch import Batch
from xllm.api.sse import DONE, event, heartbeat
from xllm.service.stream import Delta, RequestStream

PEEK_S = 1.0

HeaderList = Iterable[tuple[str, str]]


class Form(Protocol):
    """Makes events of deltas, in their order."""

    def piece(self, index: int, delta: Delta) -> bytes:
        """The events of a delta of an output choice; may be none."""

    def last(self) -> bytes:
        """What follows after all deltas."""


async def send_stream(reply: Reply, batch: Batch, form: Form, headers: HeaderList = ()) -> None:
    """Send everything and `[DONE]`. A failure after the head becomes an error event, without `[DONE]`.

    Raises what fails before the head is sent.
    """
    only = batch.only
    if only is not None:
        await _send_pushed(reply, only, form, headers)
    else:
        await _send_pulled(reply, batch.deltas(), form, headers)


# -- one request: what it says is written by who brings it ------------------------------------------------


async def _send_pushed(reply: Reply, stream: RequestStream, form: Form, headers: HeaderList) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PEEK_S):
            await stream.wait_ready()
    delta = stream.take()
    if delta is None and stream.error is not None:
        raise stream.error
    _start(reply, headers, b"" if delta is None else form.piece(delta.choice, delta))
    with heartbeat(reply):
        await _to_the_end(reply, _Push(reply, stream, form).run(), form)


class _Push:
    """Writes a delta's events the moment it comes, on the stack of who brings it.

    A task that wakes for every token of every stream costs more than all that it then does.
    """

    def __init__(self, reply: Reply, stream: RequestStream, form: Form) -> None:
        self._reply, self._stream, self._form = reply, stream, form
        self._halt: asyncio.Future[bool]

    async def run(self) -> None:
        """Return when all is written. Raises the request's error, or what a form or the client does."""
        loop = asyncio.get_running_loop()
        self._stream.listen(self._on_news)
        try:
            while True:
                self._halt = loop.create_future()
                self._on_news()
                if await self._halt:
                    break
                await self._reply.drained()
        finally:
            self._stream.listen(None)
        if self._stream.error is not None:
            raise self._stream.error

    def _on_news(self) -> None:
        """Write what there is; halt at the end (True) and when the client does not keep up (False)."""
        if self._halt.done():
            return
        try:
            while (delta := self._stream.take()) is not None:
                if data := self._form.piece(delta.choice, delta):
                    self._reply.write_now(data)
                    if not self._reply.writable:
                        self._halt.set_result(False)
                        return
        except Exception as error:  # noqa: BLE001  it is this stream's, not of who brings output
            self._halt.set_exception(error)
            return
        if self._stream.ended:
            self._halt.set_result(True)


# -- several requests: through their queue ----------------------------------------------------------------


async def _send_pulled(
    reply: Reply, deltas: AsyncIterator[tuple[int, Delta]], form: Form, headers: HeaderList
) -> None:
    first = asyncio.ensure_future(anext(deltas, None))
    try:
        await asyncio.wait({first}, timeout=PEEK_S)
        if first.done():
            first.result()
        _start(reply, headers, b"")
        with heartbeat(reply):
            await _to_the_end(reply, _pull(reply, first, deltas, form), form)
    finally:
        first.cancel()


async def _pull(
    reply: Reply,
    first: asyncio.Future[tuple[int, Delta] | None],
    deltas: AsyncIterator[tuple[int, Delta]],
    form: Form,
) -> None:
    item = await first
    while item is not None:
        if data := form.piece(*item):
            await reply.write(data)
        item = await anext(deltas, None)


# -- both -------------------------------------------------------------------------------------------------


def _start(reply: Reply, headers: HeaderList, data: bytes) -> None:
    fixed = [("cache-control", "no-store"), *headers]
    reply.start(200, "text/event-stream; charset=utf-8", fixed, data)


async def _to_the_end(reply: Reply, deltas: Awaitable[None], form: Form) -> None:
    try:
        await deltas
        last = form.last() + DONE
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001  any failure must end the stream as an event
        reply.keep_alive = False
        last = event(error_reply(error, reply.request_id).envelope)
    await reply.end(last)
