"""Telling fronts which pages this engine holds: one numbered stream of deltas for each of them.

Where a name comes from is the memory's matter, what a front makes of it the index's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm.engine.core import EngineCore
from xllm.wire.messages import EngineMessage, KvDelta

FLUSH_S = 0.05
"""A busy engine lets changes gather for so long; prefixes are long-lived compared with that."""
MAX_NAMES = 200_000
"""In one delta; a frame stays well below its limit."""


class Listener(Protocol):
    number: int
    version: int

    def send(self, message: EngineMessage) -> None: ...


class KvTeller:
    """Used by the step thread. A listener that knows nothing yet first gets everything."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._next_seq: dict[int, int] = {}
        self._listeners: dict[int, Listener] = {}
        self._new: set[int] = set()
        self._due_s = 0.0

    def add(self, listener: Listener) -> None:
        if listener.version >= 2 and self._core.has_prefix_cache:
            self._listeners[listener.number] = listener
            self._next_seq[listener.number] = 0
            self._new.add(listener.number)

    def remove(self, listener: Listener) -> None:
        self._listeners.pop(listener.number, None)
        self._next_seq.pop(listener.number, None)
        self._new.discard(listener.number)

    def start_over(self, listener: Listener) -> None:
        """It has seen a gap."""
        if listener.number in self._listeners:
            self._new.add(listener.number)

    def tell(self, may_wait: bool) -> None:
        """Send what has changed; with `may_wait` not more often than every FLUSH_S."""
        if not self._new and not self._core.has_page_news:
            return
        if may_wait and not self._new and self._core.progress.since_s < self._due_s:
            return
        self._due_s = self._core.progress.since_s + FLUSH_S
        changes = self._core.take_page_changes()
        if changes.everything:
            self._new.update(self._listeners)
        if changes.stored or changes.removed:
            for number in self._listeners.keys() - self._new:
                self._send(number, changes.stored, changes.removed)
        if self._new:
            names = self._core.page_names()
            for number in self._new:
                self._send(number, names, (), reset=True)
            self._new.clear()

    def _send(
        self, number: int, stored: Sequence[bytes], removed: Sequence[bytes], reset: bool = False
    ) -> None:
        """In pieces if need be; what is removed goes first, as within one delta."""
        listener = self._listeners[number]
        first = 0
        while first < max(len(stored), len(removed), 1):
            last = first + MAX_NAMES
            listener.send(
                KvDelta(
                    seq=self._next_seq[number],
                    stored=tuple(stored[first:last]),
                    removed=tuple(removed[first:last]),
                    reset=reset and first == 0,
                )
            )
            self._next_seq[number] += 1
            first = last
