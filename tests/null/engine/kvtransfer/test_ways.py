"""Pages arrive bit by bit as they were, by every way, pushed whole, layer by layer, or fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.null.engine.kvtransfer.peers import (
    COUNTS,
    INDICES,
    MANIFEST,
    PAGES,
    SLOTS,
    WHOLE,
    Peer,
    arrives,
    begin,
    close,
    fill,
    make_peer,
    same,
    wait_until,
)
from xllm.engine.kvtransfer import mooncake, outgoing
from xllm.engine.kvtransfer.base import Arrived, Asked, Offered, Pushed, Released, Sent

Pair = tuple[Peer, Peer]

WITHOUT_MOONCAKE = pytest.mark.skipif(mooncake.why_not() is not None, reason=str(mooncake.why_not()))


def _pair(way: str) -> Pair:
    if way == "private":
        return make_peer("shm", in_file=False), make_peer("shm", in_file=False)
    return make_peer(way), make_peer(way)  # type: ignore[arg-type]


@pytest.fixture(params=["shm", "tcp", "private"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A sender with pages of noise, and a receiver. `private`: a Unix socket, but pages in no file."""
    sender, receiver = _pair(request.param)
    fill(sender)
    yield sender, receiver
    close(sender)
    close(receiver)


@WITHOUT_MOONCAKE
def test_pages_arrive_through_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair for all of it, since ending a transfer engine takes a second."""
    monkeypatch.setattr(outgoing, "MOONCAKE_SPAN_BYTES", 1)  # the layers here are small
    sender, receiver = _pair("mooncake")
    fill(sender)
    for name, transfer in (
        ("whole", _push_whole),
        ("fetched", _fetch),
        ("layers", _push_layers),
    ):
        transfer((sender, receiver), name)
        for group in receiver.memory.groups:
            group.pages[:] = 0
    close(sender)
    close(receiver)


def _push_whole(pair: Pair, name: str) -> None:
    sender, receiver = pair
    begin(sender, receiver, name)
    sender.plane.push(name, WHOLE)
    sender.plane.finish(name, MANIFEST)
    arrived = arrives(receiver, sender, name)
    assert arrived.manifest == MANIFEST
    sent = sender.wait(Sent, name)
    assert sent.num_bytes == arrived.num_bytes == 4 * 16384 + 2 * 8192
    assert sent.transfer_ms > 0
    assert sent.exposed_ms > 0
    sender.wait(Released, name)
    assert receiver.told(Released) == []  # it comes with Arrived


def test_whole_pages_arrive_and_both_sides_hear_of_it(pair: Pair) -> None:
    _push_whole(pair, "t")


def test_pushes_before_the_receivers_yes_wait_for_it(pair: Pair) -> None:
    sender, receiver = pair
    sender.plane.send("t", receiver.plane.endpoints, COUNTS)
    sender.plane.push("t", WHOLE)
    sender.plane.finish("t", MANIFEST)
    receiver.wait(Offered)
    receiver.plane.accept("t", SLOTS)
    arrives(receiver, sender)


def _push_layers(pair: Pair, name: str) -> None:
    """The receiver has layer 0 before layer 1 exists, and nothing of a layer that is not finished."""
    sender, receiver = pair
    for group in sender.memory.groups:
        group.pages[:] = 0
    sender.word.finished_layers = 3  # of the step before
    begin(sender, receiver, name)
    sender.plane.push(name, Pushed(indices=INDICES, pages=PAGES, after_layer=True))
    write = _writer(sender)
    write(0)
    sender.word.finished_layers = 1
    # Layer 0 is one of two in the first group: half of its four pages; two of the other group are left.
    wait_until(lambda: sender.plane.num_pending(name) == 4, "half of four pages is copied")
    first, _ = receiver.memory.groups[0].spans
    slots = list(SLOTS[0])
    for at, length in first:
        wait_until(lambda a=at, n=length: _has(sender, receiver, slots, a, n), "layer 0 arrives")
    assert not receiver.memory.groups[1].pages.any()
    write(1)
    write(2)
    sender.word.finished_layers = 3
    sender.word.num_forwards += 1
    sender.plane.step_done()
    sender.plane.finish(name, MANIFEST)
    arrives(receiver, sender, name)


def test_layers_are_copied_while_the_step_writes_the_next(pair: Pair) -> None:
    _push_layers(pair, "t")


def _writer(sender: Peer) -> Callable[[int], None]:
    rng = np.random.default_rng(3)

    def write(layer: int) -> None:
        for group in sender.memory.groups:
            if layer in group.layers:
                for at, length in group.spans[group.layers.index(layer)]:
                    shape = (len(group.pages), length)
                    group.pages[:, at : at + length] = rng.integers(1, 256, shape, np.uint8)

    return write


def _has(sender: Peer, receiver: Peer, slots: list[int], at: int, length: int) -> bool:
    end = at + length
    source = sender.memory.groups[0].pages[list(PAGES[0]), at:end]
    return bool(np.array_equal(source, receiver.memory.groups[0].pages[slots, at:end]))


def test_a_step_that_was_run_again_in_parts_is_copied_anew(pair: Pair) -> None:
    """Its progress word had passed layers which rows of another sequence had not been written to yet."""
    sender, receiver = pair
    begin(sender, receiver)
    sender.plane.push("t", Pushed(indices=INDICES, pages=PAGES, after_layer=True))
    sender.word.finished_layers = 3
    slots = list(SLOTS[0])
    wait_until(
        lambda: same(sender, PAGES, receiver, SLOTS) and _has(sender, receiver, slots, 0, 16384), "early copy"
    )
    fill(sender, seed=9)  # what the second try wrote
    sender.word.num_forwards += 3
    sender.plane.step_done()
    sender.plane.finish("t", MANIFEST)
    arrives(receiver, sender)


def test_a_page_pushed_again_has_its_last_content(pair: Pair) -> None:
    sender, receiver = pair
    begin(sender, receiver)
    sender.plane.push("t", WHOLE)
    wait_until(lambda: same(sender, PAGES, receiver, SLOTS), "the first content arrives")
    sender.memory.groups[0].pages[9] ^= 255
    sender.plane.push("t", Pushed(indices=((3,), ()), pages=((9,), ())))
    sender.plane.finish("t", MANIFEST)
    arrives(receiver, sender)


def _fetch(pair: Pair, name: str) -> None:
    sender, receiver = pair
    receiver.plane.pull(name, ("unix:nowhere/xllm", *sender.plane.endpoints), root=b"r", digests=(b"d",))
    asked = sender.wait(Asked, name)
    assert (asked.root, asked.digests) == (b"r", (b"d",))
    sender.plane.give(name, WHOLE, MANIFEST)
    assert receiver.wait(Offered, name).num_pages == COUNTS
    receiver.plane.accept(name, SLOTS)
    assert arrives(receiver, sender, name).manifest == MANIFEST
    sender.wait(Sent, name)
    sender.wait(Released, name)


def test_pages_are_fetched_from_who_keeps_them(pair: Pair) -> None:
    _fetch(pair, "t")


def test_many_transfers_share_a_connection(pair: Pair) -> None:
    sender, receiver = pair
    names = [f"t{i}" for i in range(5)]
    for i, name in enumerate(names):
        sender.plane.send(name, receiver.plane.endpoints, (1, 1))
        sender.plane.push(name, Pushed(indices=((0,), (0,)), pages=((i,), (i,))))
        sender.plane.finish(name, MANIFEST.__class__(num_prompt=0))
    for i, name in enumerate(names):
        receiver.wait(Offered, name)
        receiver.plane.accept(name, ((11 - i,), (11 - i,)))
    for i, name in enumerate(names):
        if not any(e.transfer_id == name for e in receiver.told(Arrived)):
            receiver.wait(Arrived, name)
        assert same(sender, ((i,), (i,)), receiver, ((11 - i,), (11 - i,)))
