"""Copies of page parts in few calls, and digests of pages. Numpy does both without holding the interpreter.

No transfer, no socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from xllm.engine.kvtransfer.memory import Bytes2D
from xllm.engine.kvtransfer.messages import checksum


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


def page_digests(source: Bytes2D, pages: Sequence[int]) -> tuple[int, ...]:
    return tuple(checksum(source[page].data) for page in pages)
