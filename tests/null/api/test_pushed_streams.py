"""A stream's events are written on the stack of who brings its output: all of them, in order, whatever lags.

Stream and reply are fakes; the same over sockets is `test_streams` and `test_connections`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from xllm.api.http import Reply
from xllm.api.openai.batch import Batch, Submitter
from xllm.api.openai.streaming import send_stream
from xllm.api.sse import DONE
from xllm.errors import InternalError, XllmError
from xllm.service.stream import Delta, RequestStream


class FakeStream:
    request_id = "r"

    def __init__(self) -> None:
        self.ended = False
        self.error: XllmError | None = None
        self.listener: Callable[[], None] | None = None
        self._ready = asyncio.Event()
        self._deltas: deque[Delta] = deque()

    async def wait_ready(self) -> None:
        await self._ready.wait()

    def take(self) -> Delta | None:
        return self._deltas.popleft() if self._deltas else None

    def listen(self, listener: Callable[[], None] | None) -> None:
        self.listener = listener

    def say(self, text: str) -> None:
        self._deltas.append(Delta(choice=0, text=text))
        self._tell()

    def end(self, error: XllmError | None = None) -> None:
        self.ended, self.error = True, error
        self._tell()

    @property
    def num_untaken(self) -> int:
        return len(self._deltas)

    def _tell(self) -> None:
        self._ready.set()
        if self.listener is not None:
            self.listener()


class FakeReply:
    """`room` writes and its client lags, until `read` is called."""

    request_id = "q"
    keep_alive = True

    def __init__(self, room: int = 1000) -> None:
        self.written: list[bytes] = []
        self.ended = False
        self._room = room
        self._read = asyncio.Event()

    @property
    def writable(self) -> bool:
        return self._room > 0

    def start(self, status: int, content_type: str, headers: Any = (), data: bytes = b"") -> None:
        self.write_now(data)

    def write_now(self, data: bytes) -> None:
        self._room -= 1
        self.written.append(data)

    async def drained(self) -> None:
        if not self.writable:
            self._read.clear()
            await self._read.wait()

    async def end(self, data: bytes = b"") -> None:
        self.written.append(data)
        self.ended = True

    def probe(self) -> bool:
        return True

    def read(self, room: int) -> None:
        self._room = room
        self._read.set()


class Plain:
    """The text as it is; "!" cannot be told."""

    def piece(self, index: int, delta: Delta) -> bytes:
        if delta.text == "!":
            raise ValueError("no form for this")
        return delta.text.encode()

    def last(self) -> bytes:
        return b"last"


def sending(stream: FakeStream, reply: FakeReply) -> asyncio.Task[None]:
    batch = Batch(cast(Submitter, None), [cast(RequestStream, stream)], 1)
    return asyncio.create_task(send_stream(cast(Reply, reply), batch, Plain()))


async def begun(stream: FakeStream, reply: FakeReply) -> asyncio.Task[None]:
    task = sending(stream, reply)
    stream.say("a")
    async with asyncio.timeout(30):
        while stream.listener is None:
            await asyncio.sleep(0)
    return task


async def test_what_is_brought_is_written_before_the_call_returns() -> None:
    stream, reply = FakeStream(), FakeReply()
    task = await begun(stream, reply)
    for text in "bcd":
        stream.say(text)
        assert reply.written[-1] == text.encode()
    stream.end()
    await task
    assert b"".join(reply.written) == b"abcd" + b"last" + DONE
    assert reply.ended
    assert stream.listener is None


async def test_what_a_slow_client_has_no_room_for_stays_with_the_stream_and_comes_in_order() -> None:
    stream, reply = FakeStream(), FakeReply(room=2)
    task = await begun(stream, reply)
    for text in "bcdefg":
        stream.say(text)
    assert b"".join(reply.written) == b"ab"
    assert stream.num_untaken == 5  # its credit ends with the stream's buffer
    stream.end()
    async with asyncio.timeout(30):
        while not reply.ended:
            reply.read(2)
            await asyncio.sleep(0)
    await task
    assert b"".join(reply.written) == b"abcdefg" + b"last" + DONE


async def test_an_event_that_cannot_be_made_ends_its_stream_and_not_who_brought_it() -> None:
    stream, reply = FakeStream(), FakeReply()
    task = await begun(stream, reply)
    stream.say("!")
    stream.say("c")
    await task
    assert reply.written[0] == b"a"
    assert b'"error"' in reply.written[-1]
    assert DONE not in b"".join(reply.written)


async def test_an_error_comes_after_what_was_said_before_it() -> None:
    stream, reply = FakeStream(), FakeReply()
    task = await begun(stream, reply)
    stream.say("b")
    stream.end(InternalError("lost"))
    await task
    assert [w[:1] for w in reply.written[:2]] == [b"a", b"b"]
    assert b'"error"' in reply.written[-1]
    assert not reply.keep_alive


async def test_a_sender_that_is_cancelled_listens_no_more() -> None:
    stream, reply = FakeStream(), FakeReply()
    task = await begun(stream, reply)
    task.cancel()
    await asyncio.wait([task])
    assert stream.listener is None
    stream.say("late")
    assert reply.written == [b"a"]
