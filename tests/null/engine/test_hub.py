"""The engine's end of a connection: messages arrive whole and in order however slowly the front reads."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from xllm.clock import SystemClock
from xllm.engine.hub import Hub
from xllm.engine.progress import StepProgress
from xllm.engine.session import Session
from xllm.wire.codec import FrameSplitter, decode_engine, encode
from xllm.wire.messages import Drain, EngineMessage, FrontMessage, Progress


@dataclass
class Ends:
    """The front's end, and the engine's over a socket that takes little at once."""

    front: socket.socket
    hub: Hub
    session: Session

    def received(self) -> FrontMessage | None:
        """The next message that reached the inbox; None = the front is gone."""
        session, message = self.hub.inbox.get(timeout=20)
        assert session is self.session
        return message


@pytest.fixture
def ends() -> Iterator[Ends]:
    front, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    front.settimeout(20.0)
    hub = Hub(StepProgress(), SystemClock())
    session = hub.adopt(theirs)
    hub.start()
    yield Ends(front, hub, session)
    front.close()
    hub.close()


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


def test_a_backlog_keeps_its_order_and_what_comes_after_it_does_too(ends: Ends) -> None:
    backlog = [message(i, 1 + i % 7 * 5000) for i in range(64)]
    for m in backlog:
        ends.session.send(m)
    assert ends.session.backlog_bytes, "the socket took it all: this test shows nothing"
    reader = Reader(ends.front)
    got = reader.read(8, piece=700)
    # Sent while the I/O thread works on the backlog: must not overtake it.
    late = [message(100 + i, i * 900) for i in range(32)]
    for m in late:
        ends.session.send(m)
    got += reader.read(len(backlog) + len(late) - len(got))
    assert got == [*backlog, *late]


def test_a_message_that_fits_is_written_by_the_sender(ends: Ends) -> None:
    ends.session.send(message(1, 10))
    assert not ends.session.backlog_bytes
    # Nothing to wait for: it lies in the socket already.
    ends.front.setblocking(False)
    assert ends.front.recv(4096) == encode(message(1, 10))


def test_close_writes_what_is_queued(ends: Ends) -> None:
    ends.session.send(message(1, 300_000))
    ends.session.send(message(2, 10))
    ends.hub.close(timeout_s=0.0)
    assert Reader(ends.front).read(2) == [message(1, 300_000), message(2, 10)]
    assert ends.front.recv(1) == b""


def test_ending_one_session_writes_what_is_queued_and_then_closes(ends: Ends) -> None:
    ends.session.send(message(1, 300_000))
    ends.session.end()
    assert Reader(ends.front).read(1) == [message(1, 300_000)]
    assert ends.front.recv(1) == b""
    assert ends.received() is None


def test_sending_to_a_front_that_is_gone_is_no_error_and_is_told_to_the_reader(ends: Ends) -> None:
    ends.front.sendall(encode(Drain()))
    assert ends.received() == Drain()
    ends.front.close()
    assert ends.received() is None
    ends.session.send(message(1, 300_000))
    assert not ends.session.backlog_bytes


def test_a_front_that_leaves_with_a_backlog_ends_the_connection(ends: Ends) -> None:
    ends.session.send(message(1, 300_000))
    ends.front.close()
    assert ends.received() is None
    assert not ends.session.backlog_bytes
