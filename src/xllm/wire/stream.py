"""Message streams for the asyncio side (fronts): over a connected socket, or to an engine on the network.

EOF is the crash signal; nothing is queued for a peer that is gone. The engine side is
blocking and lives in `engine/hub.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Protocol

from xllm.errors import UnavailableError, XllmError
from xllm.wire.codec import (
    HEADER,
    MAX_FRAME_BYTES,
    UnknownMessageError,
    WireError,
    body_length,
    decode_engine,
    encode,
)
from xllm.wire.hello import (
    HANDSHAKE_S,
    INSTANCE,
    MAX_HANDSHAKE_FRAME_BYTES,
    Handshake,
    Identity,
    refusal,
)
from xllm.wire.messages import EngineMessage, FrontMessage, Hello
from xllm.wire.sockets import tune

log = logging.getLogger(__name__)

_READ_AHEAD_BYTES = 256 * 1024
"""Buffered beyond what somebody asked for; a frame that is awaited may be longer."""


class EngineStream(Protocol):
    """A front's end of one connection to one incarnation of an engine."""

    async def send(self, message: FrontMessage) -> None:
        """Hand over the message; waits while the peer's buffer is full. ConnectionError when it is gone."""

    async def receive(self) -> EngineMessage | None:
        """The next message, or None at EOF. Raises WireError on garbage."""

    async def close(self) -> None:
        """Close both directions; idempotent."""


class SocketEngineStream:
    """Length-prefixed msgpack over a connected Unix or TCP socket.

    `num_skipped` counts messages of a newer peer that this version does not know.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.num_skipped = 0

    @classmethod
    async def over(cls, sock: socket.socket) -> SocketEngineStream:
        """Take ownership of a connected socket."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_FRAME_BYTES + HEADER.size)
        return cls(reader, writer)

    async def send(self, message: FrontMessage) -> None:
        self._writer.write(encode(message))
        await self._writer.drain()

    async def receive(self) -> EngineMessage | None:
        while (body := await self._body(MAX_FRAME_BYTES)) is not None:
            try:
                return decode_engine(body)
            except UnknownMessageError:
                self.num_skipped += 1
        return None

    async def close(self) -> None:
        self._writer.close()
        # Shielded: all who wait share one future of asyncio, and a waiter that is cancelled would cancel it
        # for those that close after it. OSError: also TimeoutError, from the kernel for a host that is gone.
        with contextlib.suppress(OSError):
            await asyncio.shield(self._writer.wait_closed())

    async def shake_hands(self, handshake: Handshake) -> Hello:
        """Run the hand-shake as the side that connected; the peer's Hello. Raises XllmError."""
        await self.send(handshake.hello)
        while not handshake.done:
            body = await self._body(MAX_HANDSHAKE_FRAME_BYTES)
            if body is None:
                raise UnavailableError("the peer left during the hand-shake", code="engine_lost")
            try:
                answers = handshake.feed(body)
            except XllmError as error:
                await self.send(refusal(error))
                raise
            for answer in answers:
                await self.send(answer)
        if handshake.peer is None:
            raise WireError("a hand-shake ended without a hello")
        return handshake.peer

    async def _body(self, max_bytes: int) -> bytes | None:
        try:
            header = await self._reader.readexactly(HEADER.size)
            return await self._reader.readexactly(body_length(header, max_bytes))
        except (asyncio.IncompleteReadError, OSError):
            return None


async def connect_tcp(
    host: str,
    port: int,
    identity: Identity,
    *,
    accepts: str = INSTANCE,
    peer_id: str | None = None,
    timeout_s: float = HANDSHAKE_S,
) -> tuple[SocketEngineStream, Hello]:
    """A stream to the instance at the address, both sides having proved who they are; and its Hello.

    `peer_id` is the instance that is expected there, where the caller knows. Raises UnavailableError when
    nobody answers in time, else the XllmError that names what does not fit (`wire_version`, `wrong_cluster`,
    `wrong_role`, `wrong_peer`, `own_incarnation`, `cluster_key`, `bad_hello`).
    """
    where = f"{host}:{port}"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=_READ_AHEAD_BYTES)
            try:
                tune(writer.get_extra_info("socket"))
                stream = SocketEngineStream(reader, writer)
                handshake = Handshake(identity, accepts=accepts, connecting=True, peer_id=peer_id)
                return stream, await stream.shake_hands(handshake)
            except XllmError:
                writer.close()  # after what was written, which says why
                raise
            except BaseException:
                writer.transport.abort()
                raise
    except TimeoutError as error:
        message = f"the instance did not answer within {timeout_s:g} s"
        raise UnavailableError(message, code="engine_unreachable") from error
    except OSError as error:
        raise UnavailableError("the instance cannot be reached", code="engine_unreachable") from error
    except XllmError as error:
        log.warning("%s was not taken as an instance: %s (%s)", where, error.message, error.code)
        raise
