"""The engine's connection: messages arrive whole and in order however slowly the front reads."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from xllm.engine.connection import Connection
from xllm.wire.codec import FrameSplitter, decode_engine, encode
from xllm.wire.messages import Drain, EngineMessage, Progress


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Connection]]:
    """The front's end, and the engine's connection over a socket that takes little at once."""
    front, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    front.settimeout(20.0)
    connection = Connection(theirs)
    yield front, connection
    front.close()


def message(number: int, size: int) -> Progress:
    return Progress(stage="x" * size, elapsed_s=float(number))


class Reader:
    """Messages from the front's end, whatever pieces they come in."""

    def __init__(self, front: socket.socket) -> None:
        self._front, self._splitter = front, FrameSplitter()

    def read(self, count: int, piece: int = 1 << 16) -> list[EngineMessage]:
        """At least `count` messages."""
        got: list[EngineMessage] = []
        while len(got) < count:
            data = self._front.recv(piece)
            assert data, "the connection ended early"
            got += map(decode_engine, self._splitter.feed(data))
        return got


def test_a_backlog_keeps_its_order_and_what_comes_after_it_does_too(
    pair: tuple[socket.socket, Connection],
) -> None:
    front, connection = pair
    backlog = [message(i, 1 + i % 7 * 5000) for i in range(64)]
    for m in backlog:
        connection.send(m)
    assert connection._outbox, "the socket took it all: this test shows nothing"
    reader = Reader(front)
    got = reader.read(8, piece=700)
    # Sent while the I/O thread works on the backlog: must not overtake it.
    late = [message(100 + i, i * 900) for i in range(32)]
    for m in late:
        connection.send(m)
    got += reader.read(len(backlog) + len(late) - len(got))
    assert got == [*backlog, *late]


def test_a_message_that_fits_is_written_by_the_sender(pair: tuple[socket.socket, Connection]) -> None:
    front, connection = pair
    connection.send(message(1, 10))
    assert not connection._outbox
    # Nothing to wait for: it lies in the socket already.
    front.setblocking(False)
    assert front.recv(4096) == encode(message(1, 10))


def test_close_writes_what_is_queued(pair: tuple[socket.socket, Connection]) -> None:
    front, connection = pair
    connection.send(message(1, 300_000))
    connection.send(message(2, 10))
    connection._closing.set()
    connection._wake()
    assert Reader(front).read(2) == [message(1, 300_000), message(2, 10)]
    assert front.recv(1) == b""


def test_sending_to_a_front_that_is_gone_is_no_error_and_is_told_to_the_reader(
    pair: tuple[socket.socket, Connection],
) -> None:
    front, connection = pair
    front.sendall(encode(Drain()))
    assert connection.inbox.get(timeout=20) == Drain()
    front.close()
    assert connection.inbox.get(timeout=20) is None
    connection.send(message(1, 300_000))
    assert not connection._outbox


def test_a_front_that_leaves_with_a_backlog_ends_the_connection(
    pair: tuple[socket.socket, Connection],
) -> None:
    front, connection = pair
    connection.send(message(1, 300_000))
    front.close()
    assert connection.inbox.get(timeout=20) is None
    assert not connection._outbox
    connection.close()
