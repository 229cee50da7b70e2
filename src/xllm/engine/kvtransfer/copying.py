"""Copies of page parts in few calls, and digests of pages. Numpy does both without holding the interpreter.

No transfer, no socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from xllm.engine.kvtransfer.memory import Bytes2D, GroupMemory


def runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(source, target, count): stretches in which both are consecutive."""
    at, end = 0, len(sources)
    while at < end:
        first = at
        at += 1
        while at < end and sources[at] == sources[at - 1] + 1 and targets[at] == targets[at - 1] + 1:
            at += 1
        yield sources[first], targets[first], at - first


def copy_parts(
    target: Bytes2D, targets: Sequence[int], source: Bytes2D, sources: Sequence[int], offset: int, length: int
) -> None:
    """Bytes [offset, offset + length) of pages `sources` to the same bytes of pages `targets`."""
    end = offset + length
    for s, t, count in runs(sources, targets):
        target[t : t + count, offset:end] = source[s : s + count, offset:end]


def gather(source: Bytes2D, pages: Sequence[int], offset: int, length: int) -> memoryview:
    """Those bytes, one page behind the other, in memory of their own."""
    own = np.empty((len(pages), length), np.uint8)
    copy_parts_into(own, source, pages, offset, length)
    return own.reshape(-1).data


def copy_parts_into(own: Bytes2D, source: Bytes2D, pages: Sequence[int], offset: int, length: int) -> None:
    for s, t, count in runs(pages, range(len(pages))):
        own[t : t + count] = source[s : s + count, offset : offset + length]


def scatter(target: Bytes2D, pages: Sequence[int], offset: int, length: int, payload: memoryview) -> None:
    """The opposite of `gather`."""
    parts = np.frombuffer(payload, np.uint8).reshape(len(pages), length)
    for s, t, count in runs(range(len(pages)), pages):
        target[t : t + count, offset : offset + length] = parts[s : s + count]


def page_digests(group: GroupMemory, pages: Sequence[int]) -> tuple[int, ...]:
    """XXH3 of each page's bytes, layer by layer, so that it can be taken while layers come."""
    found = []
    for page in pages:
        running = RunningDigest()
        for layer in range(max(1, len(group.spans))):
            running.add(group, page, layer)
        found.append(running.value)
    return tuple(found)


class RunningDigest:
    """Of one page, while its layers come in order. Where a group knows no layers, a page is one."""

    __slots__ = ("_hash", "num_layers")

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self.num_layers = 0

    def add(self, group: GroupMemory, page: int, layer: int) -> None:
        """A layer out of order makes it useless, for good."""
        if layer != self.num_layers:
            self.num_layers = -1
            return
        self.num_layers += 1
        for offset, length in group.spans[layer] if group.spans else ((0, group.page_bytes),):
            self._hash.update(group.pages[page, offset : offset + length].data)

    @property
    def value(self) -> int:
        return int(self._hash.intdigest())


class RunningDigests:
    """Of the pages of one transfer, by group and index."""

    def __init__(self) -> None:
        self._running: dict[tuple[int, int], RunningDigest] = {}

    def add(
        self, g: int, group: GroupMemory, indices: Sequence[int], pages: Sequence[int], layer: int
    ) -> None:
        for index, page in zip(indices, pages, strict=True):
            if layer == 0:
                self._running[g, index] = RunningDigest()
            running = self._running.get((g, index))
            if running is not None:
                running.add(group, page, layer)

    def take(self, g: int, group: GroupMemory, index: int) -> int | None:
        """The digest, once, if all layers have come."""
        running = self._running.pop((g, index), None)
        return None if running is None or running.num_layers != len(group.spans) else running.value
