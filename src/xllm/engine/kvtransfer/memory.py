"""KV pages as plain bytes: what transfers copy, and where a layer's part of a page lies.

The pages belong to the runner and the step thread; a transfer touches those only that it was given. What the
bytes mean must not live here.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from xllm.engine.surviving import SharedPages
from xllm.errors import InternalError
from xllm.types import KVLayout

Bytes2D = npt.NDArray[np.uint8]
Span = tuple[int, int]
"""(offset, length) within a page."""


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """Pages of one KV group.

    `layers[i]` is the model's number of the group's i-th layer; `spans[i]` are that layer's bytes in a page,
    () where layers cannot be told apart.
    """

    pages: Bytes2D
    layers: tuple[int, ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()
    file_offset: int = 0

    @property
    def num_pages(self) -> int:
        return int(self.pages.shape[0])

    @property
    def page_bytes(self) -> int:
        return int(self.pages.shape[1])

    @property
    def separable(self) -> bool:
        return bool(self.spans)

    @property
    def span_bytes(self) -> int:
        """The shortest piece of a layer."""
        return min((length for spans in self.spans for _, length in spans), default=0)

    def stretches(self, first: int, end: int) -> list[Span]:
        """The bytes of layers [first, end), neighbours put together."""
        found: list[Span] = []
        for offset, length in sorted(span for spans in self.spans[first:end] for span in spans):
            if found and sum(found[-1]) == offset:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((offset, length))
        return found


@dataclass(frozen=True, slots=True)
class KVMemory:
    """All groups, in the layout's order. `fd` is the anonymous file they lie in, if they do."""

    groups: tuple[GroupMemory, ...]
    fd: int | None = None

    @property
    def page_bytes(self) -> tuple[int, ...]:
        return tuple(g.page_bytes for g in self.groups)


class StepWatch(Protocol):
    """What a runner tells of its running step; read by another thread, so single words without locks."""

    @property
    def finished_layers(self) -> int:
        """Of the forward pass that runs; 0 where nobody counts."""

    @property
    def num_forwards(self) -> int:
        """Forward passes so far. A step that failed and is run again in parts has several."""

    def forget_layers(self) -> None:
        """Between two steps: `finished_layers` is 0 until the next one has finished a layer."""


class Unwatched:
    """For runners that do not count: everything is copied when the step has ended."""

    finished_layers = 0
    num_forwards = 0

    def forget_layers(self) -> None:
        return


def of_layers(layout: KVLayout, pages: Sequence[Bytes2D], shared: SharedPages | None = None) -> KVMemory:
    """Of pages kept as (2, layer, …): K of all layers, then V of all layers, each layer's in one piece.

    Both orders we have begin so (`page,kv,layer,…`); scales stand within a layer's piece. `shared`: the file
    that the pages lie in, group by group.
    """
    if not layout.order.startswith("page,kv,layer,"):
        raise InternalError(f"layers of a page in order {layout.order} cannot be told apart")
    if shared is not None and not shared.groups:
        shared = None  # a platform that keeps its pages elsewhere
    groups = []
    for g, (group, array) in enumerate(zip(layout.groups, pages, strict=True)):
        count = len(group.layers)
        piece, rest = divmod(int(array.shape[1]), 2 * count)
        if rest:
            raise InternalError("a page is not a whole number of layers")
        spans = tuple(((i * piece, piece), ((count + i) * piece, piece)) for i in range(count))
        offset = 0 if shared is None else shared.groups[g].offset
        groups.append(GroupMemory(array, group.layers, spans, offset))
    return KVMemory(tuple(groups), None if shared is None else shared.fd)


def inseparable(pages: Sequence[Bytes2D], shared: SharedPages | None = None) -> KVMemory:
    """Of pages whose inside is nobody's business."""
    if shared is not None and not shared.groups:
        shared = None
    offsets = [0] * len(pages) if shared is None else [group.offset for group in shared.groups]
    groups = tuple(GroupMemory(p, file_offset=at) for p, at in zip(pages, offsets, strict=True))
    return KVMemory(groups, None if shared is None else shared.fd)


def anonymous_pages(name: str = "engine") -> SharedPages | None:
    """A file for the pages of an engine that inherited none, so that peers on this machine can write to them.

    It ends with the last process that has it open. None where the system has no such files.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        fd = os.memfd_create(f"xllm-kv-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return SharedPages(fd, lasting=False)
