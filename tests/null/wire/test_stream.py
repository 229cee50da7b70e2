"""A front's end of a connection: who closes it may be cancelled, and the next one closes it all the same."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from xllm.wire.stream import SocketEngineStream


async def test_a_close_that_is_cancelled_does_not_cancel_the_next_one() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = await SocketEngineStream.over(ours)
        closing = asyncio.create_task(stream.close())
        await asyncio.sleep(0)  # it waits for the end now
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        assert closing.cancelled()
        await stream.close()
        assert theirs.recv(1) == b""
