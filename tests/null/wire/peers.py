"""Peers of an instance for tests: an honest front, and bare sockets that may say anything."""

from __future__ import annotations

import socket

from xllm.engine.server import InstanceServer
from xllm.service.instances.handshake import attach
from xllm.types import RequestSpec
from xllm.wire.codec import HEADER, FrameSplitter, encode
from xllm.wire.hello import FRONT, Handshake, Identity, decode_handshake
from xllm.wire.messages import (
    Attach,
    Committed,
    EngineMessage,
    Frame,
    Frames,
    FrontMessage,
    Hello,
    Ready,
    Refused,
    Stats,
    Submit,
)
from xllm.wire.stream import SocketEngineStream, connect_tcp


class FrontEnd:
    """A front of a test: commits whatever it gets, unless told to be slow."""

    def __init__(self, stream: SocketEngineStream, ready: Ready) -> None:
        self.stream, self.ready = stream, ready
        self.frames: list[Frame] = []
        self.messages: list[EngineMessage] = []
        self.draining = False

    async def submit(self, spec: RequestSpec) -> None:
        await self.stream.send(Submit(spec=spec))

    async def until_last(self, *request_ids: str, commit: bool = True) -> None:
        """Read until each of the requests has ended."""
        missing = set(request_ids)
        while missing:
            missing -= {f.request_id for f in await self.next_frames(commit) if f.last}

    async def next_frames(self, commit: bool = True) -> tuple[Frame, ...]:
        while True:
            message = await self.next()
            if isinstance(message, Frames):
                self.frames += message.frames
                counts = tuple((f.request_id, f.choice, f.offset + len(f.tokens)) for f in message.frames)
                if commit:
                    await self.stream.send(Committed(counts=counts))
                return message.frames

    async def next(self) -> EngineMessage:
        message = await self.stream.receive()
        assert message is not None, "the engine closed the connection"
        self.messages.append(message)
        if isinstance(message, Frames | Stats):
            self.draining = message.snapshot.draining
        return message

    async def until_closed(self) -> list[EngineMessage]:
        """What still comes before the engine closes the connection."""
        got: list[EngineMessage] = []
        while (message := await self.stream.receive()) is not None:
            got.append(message)
        await self.stream.close()
        return got

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(t for f in self.frames if f.request_id == request_id for t in f.tokens)

    def last(self, request_id: str) -> Frame:
        (frame,) = [f for f in self.frames if f.request_id == request_id and f.last]
        return frame


async def join(server: InstanceServer) -> FrontEnd:
    """A front of the server's own cluster."""
    own = server.identity
    stream, hello = await connect_tcp(*server.address, Identity(role=FRONT, cluster=own.cluster, key=own.key))
    assert hello.incarnation == own.incarnation
    return FrontEnd(stream, await attach(stream))


class RawPeer:
    """A blocking socket to an instance; given one, the test says when to `connect`."""

    def __init__(self, address: tuple[str, int], sock: socket.socket | None = None) -> None:
        self._address = address
        self.sock = sock or socket.create_connection(address, timeout=20.0)
        self._splitter = FrameSplitter()
        self._bodies: list[bytes] = []

    def connect(self) -> None:
        self.sock.settimeout(20.0)
        self.sock.connect(self._address)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def body(self) -> bytes | None:
        """The next frame's body, None once the instance has closed."""
        while not self._bodies:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self._bodies += self._splitter.feed(data)
        return self._bodies.pop(0)

    def hello(self) -> tuple[Hello, bytes]:
        body = self.body()
        assert body is not None
        hello = decode_handshake(body)
        assert isinstance(hello, Hello)
        return hello, body

    def refusal(self) -> str:
        """The code of the refusal that must come next, and then the end."""
        body = self.body()
        assert body is not None, "closed without a word"
        refused = decode_handshake(body)
        assert isinstance(refused, Refused), refused
        assert self.body() is None
        return refused.error.code

    def shake_hands(self, identity: Identity) -> None:
        handshake = Handshake(identity, accepts="instance", connecting=True)
        self.send(encode(handshake.hello))
        while not handshake.done:
            body = self.body()
            assert body is not None
            for answer in handshake.feed(body):
                self.send(encode(answer))

    def say(self, *messages: FrontMessage) -> None:
        self.send(b"".join(map(encode, messages)))

    def join(self, identity: Identity | None = None) -> None:
        self.shake_hands(identity or Identity(role=FRONT))
        self.say(Attach())

    def close(self) -> None:
        self.sock.close()


def frame(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body
