"""An engine's connection to one front: written where the output is made.

Nobody waits for the socket: what it does not take at once goes to an outbox, which the I/O thread (`hub`)
writes when it can. Knows frames and bounds; it does not look into messages and decides nothing.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable

from xllm.wire.codec import MAX_FRAME_BYTES, encode
from xllm.wire.messages import WIRE_VERSION, EngineMessage

MAX_OUTBOX_BYTES = MAX_FRAME_BYTES
"""Owed to a front that does not read. The credit window keeps its requests' output far below that."""


class Session:
    """One connection of one front; a `Port`.

    `taken`, written by the step thread, counts messages it has dealt with; at `resume_at` the I/O thread
    reads on. Invariant: while `_outbox` holds anything, only the I/O thread writes, so order is kept.
    `_lock` guards the outbox and every write and the close of the socket; nobody blocks while holding it.
    """

    def __init__(self, sock: socket.socket, number: int, flush_later: Callable[[Session], None]) -> None:
        self.number = number
        self.version = WIRE_VERSION
        self.pulsing = False
        self.taken = 0
        self.resume_at = 0
        self.overflowed = False
        self.ending = False
        self._sock = sock
        self._flush_later = flush_later
        self._lock = threading.Lock()
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0
        self._closed = False

    def send(self, message: EngineMessage) -> None:
        """Write a message or queue it; never blocks. Dropped when the peer is gone or too far behind.

        Written here and not by the I/O thread: to wake that one costs more than the write, and it would
        then compete with the step that has begun for the interpreter lock and a core.
        """
        frame = encode(message)
        with self._lock:
            if self._closed or self.overflowed:
                return
            if self._outbox and self._outbox_bytes + len(frame) > MAX_OUTBOX_BYTES:
                self.overflowed = True
                self._drop_outbox()
            else:
                self._outbox.append(memoryview(frame))
                self._outbox_bytes += len(frame)
                if len(self._outbox) > 1 or self._write():
                    return
        self._flush_later(self)

    def took(self) -> None:
        """A message of this session was dealt with; for the step thread."""
        self.taken += 1
        if self.taken == self.resume_at:
            self._flush_later(self)

    def end(self) -> None:
        """Close once what is queued has been written; for the step thread."""
        self.ending = True
        self._flush_later(self)

    @property
    def backlog_bytes(self) -> int:
        return self._outbox_bytes

    # -- for the I/O thread -------------------------------------------------------------------

    @property
    def sock(self) -> socket.socket:
        return self._sock

    def flush(self) -> bool:
        """Write what the socket takes; whether nothing is left."""
        with self._lock:
            return self._closed or self._write()

    def close(self) -> None:
        with self._lock:
            # Under the lock, since the number of a closed socket may soon be somebody else's.
            self._closed = True
            self._drop_outbox()
            self._sock.close()

    def _write(self) -> bool:
        """Holding the lock; False = the rest must wait for the socket.

        A broken connection takes everything: the I/O thread learns of it by reading.
        """
        while self._outbox:
            data = self._outbox[0]
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                return False
            except OSError:
                self._drop_outbox()
                return True
            self._outbox_bytes -= sent
            if sent < len(data):
                self._outbox[0] = data[sent:]
            else:
                self._outbox.popleft()
        return True

    def _drop_outbox(self) -> None:
        self._outbox.clear()
        self._outbox_bytes = 0
