"""One connection between two engines: hand-shake, frames in and out, descriptors. Never blocks.

Used by the I/O thread only, which tells it when the socket is ready and ends it when it raises. What a
transfer is must not be known here.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from xllm.engine.kvtransfer.endpoints import Road
from xllm.engine.kvtransfer.messages import (
    FRAME,
    MAX_HEAD_BYTES,
    MAX_PAYLOAD_BYTES,
    BadFrameError,
    Message,
    check_head,
    checksum,
    decode,
    encode,
    frame,
)
from xllm.engine.kvtransfer.window import Window
from xllm.errors import UnavailableError, XllmError
from xllm.wire.hello import INSTANCE, MAX_HANDSHAKE_FRAME_BYTES, Handshake, Identity, refusal
from xllm.wire.messages import Hello, Proof, Refused

MAX_FDS = 4
"""Descriptors a peer may have sent without our having asked for one."""

_READS = 8
"""Reads from one socket before the others have their turn."""
_handshake_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Out:
    data: memoryview
    fd: int | None = None


class Arrival:
    """A message; `payload` is None where what came is not what was sent."""

    __slots__ = ("message", "payload")

    def __init__(self, message: Message, payload: memoryview | None) -> None:
        self.message = message
        self.payload = payload


class Connection:
    """`ready` once both sides have proved who they are; until then nothing but the hand-shake is decoded."""

    def __init__(self, sock: socket.socket, identity: Identity, road: Road, *, connecting: bool) -> None:
        self.sock = sock
        self.road = road
        self.connecting = connecting
        self.connected = not connecting
        self.ready = False
        self.closed = False
        self.lost = False
        """Silent for too long; it may come back."""
        self.since_s = 0.0
        self.heard_s = 0.0
        self.said_s = 0.0
        self.moved_s = 0.0
        """When bytes last went out, or began to wait."""
        self.window: Window | None = None
        """The peer's pages, mapped; ends with the connection."""
        self.fd_told = False
        self.fds: deque[int] = deque()
        self._handshake = Handshake(identity, accepts=INSTANCE, connecting=connecting)
        self._out: deque[_Out] = deque()
        self.out_bytes = 0
        self._header = bytearray(FRAME.size)
        self._body: bytearray | None = None
        self._filled = 0
        self._shape = (0, 0, 0, 0)
        if not connecting:
            self._say(self._handshake.hello)

    # -- out ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The socket has connected."""
        self.connected = True
        self._say(self._handshake.hello)

    def send(self, message: Message, payload: bytes | memoryview = b"", fd: int | None = None) -> None:
        """Queue a frame; `fd` goes with its first byte. After the end it is forgotten."""
        if not self.closed:
            self._queue(encode(message), payload, fd)

    def flush(self, now_s: float) -> None:
        """Write what the socket takes. Raises OSError when the peer is gone."""
        while self._out:
            first = self._out[0]
            try:
                if first.fd is not None:
                    count = socket.send_fds(self.sock, [first.data], [first.fd])
                    first.fd = None
                else:
                    count = self.sock.send(first.data)
            except BlockingIOError:
                return
            self.moved_s = self.said_s = now_s
            self.out_bytes -= count
            if count < len(first.data):
                first.data = first.data[count:]
                return
            self._out.popleft()

    @property
    def wants_write(self) -> bool:
        return bool(self._out) or not self.connected

    def _say(self, message: Hello | Proof | Refused) -> None:
        self._queue(_handshake_encoder.encode(message), b"", None)

    def _queue(self, head: bytes, payload: bytes | memoryview, fd: int | None) -> None:
        parts = [_Out(memoryview(frame(head, payload)), fd)]
        if len(payload):
            parts.append(_Out(memoryview(payload).cast("B")))
        self._out.extend(parts)
        self.out_bytes += sum(len(p.data) for p in parts)

    # -- in -------------------------------------------------------------------------------------

    def receive(self, now_s: float) -> Iterator[Arrival]:
        """What has come. Raises EOFError or OSError at its end, XllmError for what does not belong here."""
        for _ in range(_READS):
            if not self._read(now_s):
                return
            if self._body is None or self._filled < len(self._body):
                continue
            body, self._body, self._filled = self._body, None, 0
            arrival = self._complete(memoryview(body))
            if arrival is not None:
                yield arrival

    def _read(self, now_s: float) -> bool:
        """Take some bytes; False when there are none now."""
        into = self._header if self._body is None else self._body
        view = memoryview(into)[self._filled :]
        try:
            if self.road == "unix":
                count, ancillary, flags, _ = self.sock.recvmsg_into(
                    [view], socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
                self._take_fds(ancillary)
                if flags & socket.MSG_CTRUNC or len(self.fds) > MAX_FDS:
                    raise BadFrameError("descriptors that nobody asked for")
            else:
                count = self.sock.recv_into(view)
        except BlockingIOError:
            return False
        if not count:
            raise EOFError
        self.heard_s = now_s
        self.lost = False
        self._filled += count
        if self._body is None and self._filled == FRAME.size:
            self._shape = FRAME.unpack(self._header)
            self._body, self._filled = self._room(), 0
        return True

    def _room(self) -> bytearray:
        head_bytes, payload_bytes = self._shape[:2]
        most, most_payload = (
            (MAX_HEAD_BYTES, MAX_PAYLOAD_BYTES) if self.ready else (MAX_HANDSHAKE_FRAME_BYTES, 0)
        )
        if not 0 < head_bytes <= most or payload_bytes > most_payload:
            raise BadFrameError("a frame of impossible size")
        return bytearray(head_bytes + payload_bytes)

    def _take_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                self.fds.extend(numbers)

    def _complete(self, body: memoryview) -> Arrival | None:
        head_bytes, payload_bytes, head_digest, payload_digest = self._shape
        head = bytes(body[:head_bytes])
        check_head(head, payload_bytes, head_digest)
        if not self.ready:
            self._shake(head)
            return None
        payload = body[head_bytes:]
        sound = not payload_bytes or checksum(payload) == payload_digest
        return Arrival(decode(head), payload if sound else None)

    def _shake(self, head: bytes) -> None:
        try:
            for answer in self._handshake.feed(head):
                self._say(answer)
        except XllmError as error:
            self._say(refusal(error))
            raise
        self.ready = self._handshake.done

    # -- end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Idempotent. What the peer wrote through, or we to it, has been done before by this very thread."""
        if self.closed:
            return
        self.closed = True
        self._out.clear()
        self.out_bytes = 0
        try:
            self.sock.close()
        finally:
            while self.fds:
                os.close(self.fds.popleft())
            self.window = None

    def take_fd(self) -> int:
        """The oldest descriptor that came. Raises UnavailableError."""
        if not self.fds:
            raise UnavailableError("a peer named its pages without giving them", code="transfer_refused")
        return self.fds.popleft()
