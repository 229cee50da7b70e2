"""The engine's I/O thread: one connection to one front, blocked in poll.

Reads whole messages into an inbox and writes an outbox, so that the step thread never waits for a
socket. Knows frames and EOF; it does not look into messages and decides nothing.
"""

from __future__ import annotations

import queue
import selectors
import socket
import threading
from collections import deque

from xllm.wire.codec import FrameSplitter, WireError, decode_front, encode
from xllm.wire.messages import EngineMessage, FrontMessage

_READ_BYTES = 1 << 18


class Connection:
    """`inbox` yields messages in order, then None once the peer is gone or broke the protocol."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self.inbox: queue.SimpleQueue[FrontMessage | None] = queue.SimpleQueue()
        # The credit window bounds what a peer can make us owe it, hence the size of the outbox.
        self._outbox: deque[bytes] = deque()
        self._wake_recv, self._wake_send = socket.socketpair()
        self._wake_recv.setblocking(False)
        self._wake_send.setblocking(False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)
        self._thread.start()

    def send(self, message: EngineMessage) -> None:
        """Queue a message; never blocks. Dropped when the peer is gone."""
        self._outbox.append(encode(message))
        self._wake()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then close."""
        self._closing.set()
        self._wake()
        self._thread.join(timeout_s)

    def _wake(self) -> None:
        try:
            self._wake_send.send(b"\0")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already
        except OSError:
            return  # closed: nobody to wake

    def _run(self) -> None:
        try:
            self._loop()
        except (ConnectionError, WireError):
            pass
        finally:
            self._sock.close()
            self._wake_recv.close()
            self._wake_send.close()
            self.inbox.put(None)

    def _loop(self) -> None:
        splitter = FrameSplitter()
        pending = memoryview(b"")
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_recv, selectors.EVENT_READ)
            selector.register(self._sock, selectors.EVENT_READ)
            while True:
                pending = self._write(pending)
                if self._closing.is_set() and not pending and not self._outbox:
                    return
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if pending else 0)
                selector.modify(self._sock, wanted)
                for key, events in selector.select():
                    if key.fileobj is self._wake_recv:
                        self._wake_recv.recv(4096)
                    elif events & selectors.EVENT_READ and not self._read(splitter):
                        return

    def _read(self, splitter: FrameSplitter) -> bool:
        data = self._sock.recv(_READ_BYTES)
        for body in splitter.feed(data):
            self.inbox.put(decode_front(body))
        return bool(data)

    def _write(self, pending: memoryview) -> memoryview:
        while True:
            if not pending:
                if not self._outbox:
                    return pending
                pending = memoryview(self._outbox.popleft())
            try:
                pending = pending[self._sock.send(pending) :]
            except BlockingIOError:
                return pending
