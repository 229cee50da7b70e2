"""Memory that is touched shortly before it is needed, by a thread of its own that rests a lot.

The first touch of a fresh KV page costs a step about a millisecond, since the kernel has to find and clear
the memory. Touching all of it at start would delay readiness by seconds and take memory that may never be
used, so a margin is kept ahead of the highest byte in use. What must not live here: what the bytes mean.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy.typing as npt

MARGIN_BYTES = 512 << 20
"""Kept touched beyond what is in use: some hundred pages, which a burst of requests may take at once."""

_CHUNK_BYTES = 2 << 20
"""Small enough that a step which needs the same core does not wait long for the kernel."""
_ALIGN = 4096
_HUGEPAGE = 14
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, Linux 5.14: faults for writing and keeps what is there, so it may race with a step."""
_REST = 3.0
"""Rests this many times as long as it worked, so that a step which shares its core loses little.

It does not lower its priority instead: when the process is killed, its connections close only after its
last thread has run, and on busy cores a thread of the lowest priority waited for that up to 4.7 s.
"""


class Prefault:
    """Keeps [0, in use + margin) of an array touched until `close`; stops where the kernel cannot do it.

    The thread holds the array, so its memory outlives every call into the kernel.
    """

    def __init__(self, memory: npt.NDArray[Any], margin: int = MARGIN_BYTES) -> None:
        self._memory = memory
        self._start = -(-memory.ctypes.data // _ALIGN) * _ALIGN
        self._size = max(0, (memory.ctypes.data + memory.nbytes) // _ALIGN * _ALIGN - self._start)
        self._margin = margin
        self._wanted = min(margin, self._size)
        self._touched = 0
        self._closed = False
        self._changed = threading.Condition()
        self._madvise: Any = getattr(ctypes.CDLL(None), "madvise", None)
        self._thread: threading.Thread | None = None
        if self._size and self._advise(0, self._size, _HUGEPAGE):
            self._thread = threading.Thread(target=self._work, name="xllm-prefault", daemon=True)
            self._thread.start()

    @property
    def num_touched(self) -> int:
        return self._touched

    def use(self, end: int) -> None:
        """Bytes before `end` are in use. Cheap: half a margin is given away before the thread is woken."""
        wanted = min(end + self._margin, self._size)
        if wanted > self._wanted + self._margin // 2 or self._wanted < wanted == self._size:
            with self._changed:
                self._wanted = max(self._wanted, wanted)
                self._changed.notify_all()

    def wait(self) -> int:
        """Bytes touched, once they are all that is wanted or the thread has ended. For tests and tools."""
        with self._changed:
            self._changed.wait_for(lambda: self._touched >= self._wanted or self._ended())
        return self._touched

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ended(self) -> bool:
        return self._closed or self._thread is None

    def _advise(self, first: int, count: int, advice: int) -> bool:
        if self._madvise is None:
            return False
        address = ctypes.c_void_p(self._start + first)
        return int(self._madvise(address, ctypes.c_size_t(count), advice)) == 0 or advice == _HUGEPAGE

    def _work(self) -> None:
        able = True
        while able and not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._touched < self._wanted)
            count = min(_CHUNK_BYTES, self._wanted - self._touched)
            began_s = time.monotonic()
            able = self._closed or self._advise(self._touched, count, _POPULATE_WRITE)
            with self._changed:
                self._touched += count if able else 0
                self._changed.notify_all()
            time.sleep(_REST * (time.monotonic() - began_s))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
