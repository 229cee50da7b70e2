"""Two engines' transfers in one process: pages of random bytes, and what each step thread was told."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from xllm.engine.kvtransfer.base import (
    Arrived,
    ChoiceState,
    Failed,
    Manifest,
    Offered,
    Pushed,
    Released,
    Slots,
    TransferEvent,
)
from xllm.engine.kvtransfer.links import TransferLimits
from xllm.engine.kvtransfer.memory import KVMemory, anonymous_pages, of_layers
from xllm.engine.kvtransfer.plane import DataPlane, Ways
from xllm.engine.kvtransfer.sharing import PageKind
from xllm.types import KVGroup, KVLayout
from xllm.wire.hello import INSTANCE, Identity
from xllm.wire.proof import ClusterKey

LAYOUT = KVLayout(
    groups=(
        KVGroup(kind="full", layers=(0, 2), num_kv_heads=2, head_dim=16),
        KVGroup(kind="window", layers=(1,), num_kv_heads=2, head_dim=16, window=128),
    ),
    dtype="bfloat16",
)
NUM_PAGES = 12
KIND = PageKind(numerics_class="class", layout_digest=LAYOUT.digest(), page_size=64)
KEY = b"a key that all of them have"
PATIENCE_S = 20.0
"""Longer than any limit of the thing under test; reached only by a failure."""

E = TypeVar("E", bound=TransferEvent)


@dataclass(slots=True)
class Word:
    """A runner's progress."""

    finished_layers: int = 0
    num_forwards: int = 0

    def forget_layers(self) -> None:
        self.finished_layers = 0


@dataclass(slots=True)
class Peer:
    memory: KVMemory
    plane: DataPlane
    word: Word
    events: queue.SimpleQueue[TransferEvent]
    seen: list[TransferEvent] = field(default_factory=list)

    def wait(self, kind: type[E], transfer_id: str = "t") -> E:
        """The next event of this kind; those before it must concern others or be of other kinds."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                event = self.events.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} of {transfer_id}; seen: {self.seen}") from None
            self.seen.append(event)
            if isinstance(event, kind) and event.transfer_id == transfer_id:
                return event

    def told(self, kind: type[E]) -> list[E]:
        """All of a kind so far."""
        while not self.events.empty():
            self.seen.append(self.events.get())
        return [event for event in self.seen if isinstance(event, kind)]

    def ends(self, code: str, transfer_id: str = "t") -> None:
        """It fails with this code, and its pages come back once."""
        assert self.wait(Failed, transfer_id).error.code == code
        self.wait(Released, transfer_id)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until_s:
            raise AssertionError(f"it never happened: {what}")
        time.sleep(0.002)


def make_peer(
    ways: Ways,
    *,
    in_file: bool = True,
    kind: PageKind = KIND,
    key: bytes = KEY,
    limits: TransferLimits | None = None,
    layout: KVLayout = LAYOUT,
    clock: Callable[[], float] = time.perf_counter,
) -> Peer:
    shared = anonymous_pages("test") if in_file else None
    pages = []
    for group in layout.groups:
        size = group.page_bytes(2)
        fresh = (
            np.zeros((NUM_PAGES, size), np.uint8) if shared is None else shared.next_group(NUM_PAGES, size)
        )
        pages.append(fresh)
    memory = of_layers(layout, pages, shared)
    events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
    word = Word()
    identity = Identity(role=INSTANCE, key=ClusterKey(key))
    plane = DataPlane(memory, kind, identity, events.put, watch=word, ways=ways, limits=limits, clock=clock)
    plane.start()
    return Peer(memory, plane, word, events)


def close(peer: Peer) -> None:
    peer.plane.close()
    if peer.memory.fd is not None:
        os.close(peer.memory.fd)


def fill(peer: Peer, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    for group in peer.memory.groups:
        group.pages[:] = rng.integers(0, 256, group.pages.shape, np.uint8)


def same(source: Peer, pages: Slots, target: Peer, slots: Slots) -> bool:
    return all(
        np.array_equal(a.pages[list(p)], b.pages[list(s)])
        for a, p, b, s in zip(source.memory.groups, pages, target.memory.groups, slots, strict=True)
    )


def untouched(peer: Peer, but: Slots = ((), ())) -> bool:
    """Whether all pages that were not leased are still zero."""
    return all(
        not np.delete(group.pages, list(slots), axis=0).any()
        for group, slots in zip(peer.memory.groups, but, strict=True)
    )


PAGES: Slots = ((3, 4, 5, 9), (2, 7))
SLOTS: Slots = ((8, 1, 2, 3), (10, 0))
INDICES: Slots = ((0, 1, 2, 3), (0, 1))
COUNTS = (4, 2)
WHOLE = Pushed(indices=INDICES, pages=PAGES)
MANIFEST = Manifest(
    num_prompt=3,
    choices=(
        ChoiceState(
            choice=0, tokens=tuple(range(200)), num_computed=199, pages=((0, 1, 2, 3), (-1, -1, 0, 1))
        ),
    ),
)


def begin(sender: Peer, receiver: Peer, transfer_id: str = "t") -> None:
    """Offered, and accepted into SLOTS."""
    sender.plane.send(transfer_id, receiver.plane.endpoints, COUNTS)
    offered = receiver.wait(Offered, transfer_id)
    assert offered.num_pages == COUNTS
    receiver.plane.accept(transfer_id, SLOTS)


def arrives(receiver: Peer, sender: Peer, transfer_id: str = "t") -> Arrived:
    arrived = receiver.wait(Arrived, transfer_id)
    assert same(sender, PAGES, receiver, SLOTS)
    assert untouched(receiver, SLOTS)
    return arrived
