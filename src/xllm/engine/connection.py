"""An engine's connection to its front: written where the output is made, read by a thread blocked in poll.

Nobody waits for the socket: what it does not take at once goes to an outbox, which the I/O thread
writes when it can. Knows frames and EOF; it does not look into messages and decides nothing.
"""

from __future__ import annotations

import queue
import selectors
import socket
import threading
from collections import deque

from xllm.wire.codec import FrameSplitter, WireError, decode_front, encode
from xllm.wire.messages import EngineMessage, FrontMessage

_READ_BYTES = 1 << 16
"""Below the size from which the allocator maps and unmaps memory for every read."""


class Connection:
    """`inbox` yields messages in order, then None once the peer is gone or broke the protocol.

    Invariant: while `_outbox` holds anything, only the I/O thread writes, so order is kept. `_lock` guards
    the outbox and every write and the close of the socket; nobody blocks while holding it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self.inbox: queue.SimpleQueue[FrontMessage | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # The credit window bounds what a peer can make us owe it, hence the size of the outbox.
        self._outbox: deque[memoryview] = deque()
        self._wake_recv, self._wake_send = socket.socketpair()
        self._wake_recv.setblocking(False)
        self._wake_send.setblocking(False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)
        self._thread.start()

    def send(self, message: EngineMessage) -> None:
        """Write a message or queue it; never blocks. Dropped when the peer is gone.

        Written here and not by the I/O thread: to wake that one costs more than the write, and it would
        then compete with the step that has begun for the interpreter lock and a core.
        """
        with self._lock:
            self._outbox.append(memoryview(encode(message)))
            if len(self._outbox) > 1 or self._write_outbox():
                return
        self._wake()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then close."""
        self._closing.set()
        self._wake()
        self._thread.join(timeout_s)

    def _write_outbox(self) -> bool:
        """Write as much as the socket takes, holding the lock; False = the rest must wait for it.

        A broken connection takes everything: the I/O thread learns of it by reading.
        """
        while self._outbox:
            data = self._outbox[0]
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                return False
            except OSError:
                self._outbox.clear()
                return True
            if sent < len(data):
                self._outbox[0] = data[sent:]
            else:
                self._outbox.popleft()
        return True

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
            with self._lock:
                # Under the lock, since the number of a closed socket may soon be somebody else's.
                self._sock.close()
                self._outbox.clear()
            self._wake_recv.close()
            self._wake_send.close()
            self.inbox.put(None)

    def _loop(self) -> None:
        splitter = FrameSplitter()
        wanted = selectors.EVENT_READ
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_recv, selectors.EVENT_READ)
            selector.register(self._sock, wanted)
            while True:
                with self._lock:
                    all_written = self._write_outbox()
                if self._closing.is_set() and all_written:
                    return
                now_wanted = selectors.EVENT_READ | (0 if all_written else selectors.EVENT_WRITE)
                if now_wanted != wanted:
                    wanted = now_wanted
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
