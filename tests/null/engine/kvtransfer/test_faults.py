"""Whatever goes wrong on the way: both sides hear it by name, once, have their pages back, and nothing else
has been written to. Each test first shows that its fault happened."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from tests.faultlab.tcpproxy import HEALTHY, TcpProxy, Toxics
from tests.null.engine.kvtransfer.peers import (
    COUNTS,
    KIND,
    LAYOUT,
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
    untouched,
    wait_until,
)
from xllm.engine.kvtransfer.base import Arrived, Failed, Offered, Pushed, Released, Sent
from xllm.engine.kvtransfer.links import TransferLimits
from xllm.engine.kvtransfer.messages import (
    FRAME,
    MAX_HEAD_BYTES,
    Accept,
    Data,
    Finish,
    Message,
    Offer,
    Passed,
    Wrote,
    checksum,
    encode,
    frame,
)
from xllm.engine.kvtransfer.senders import Senders
from xllm.errors import ErrorInfo
from xllm.types import KVGroup, KVLayout
from xllm.wire.hello import INSTANCE, Handshake, Identity
from xllm.wire.proof import ClusterKey

QUICK = TransferLimits(silent_s=0.8, ping_s=0.1, answer_s=10.0)


@pytest.fixture
def make() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def one(ways: str = "shm", **how: object) -> Peer:
        made.append(make_peer(ways, **how))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for peer in made:
        close(peer)


@pytest.fixture
def proxy_to(make: Callable[..., Peer]) -> Iterator[Callable[[Peer], TcpProxy]]:
    """A proxy in front of a peer that listens on TCP."""
    made: list[TcpProxy] = []

    def one(peer: Peer) -> TcpProxy:
        proxy = TcpProxy(int(peer.plane.endpoints[-1].rsplit(":", 1)[1]))
        proxy.__enter__()
        made.append(proxy)
        return proxy

    yield one
    for proxy in made:
        proxy.__exit__()


def _at(proxy: TcpProxy) -> tuple[str, ...]:
    return (f"tcp:127.0.0.1:{proxy.port}",)


def _still_works(sender: Peer, receiver: Peer, name: str = "after") -> None:
    begin(sender, receiver, name)
    sender.plane.push(name, WHOLE)
    sender.plane.finish(name, MANIFEST)
    arrives(receiver, sender, name)
    sender.wait(Sent, name)


# -- refusals by name ----------------------------------------------------------------------------


@pytest.mark.parametrize("ways", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (replace(KIND, numerics_class="another"), "transfer_class"),
        (replace(KIND, layout_digest="another"), "transfer_layout"),
        (replace(KIND, page_size=32), "transfer_layout"),
    ],
)
def test_pages_of_another_kind_are_refused_by_name(
    make: Callable[..., Peer], ways: str, kind: object, code: str
) -> None:
    sender, receiver = make(ways), make(ways, kind=kind)
    sender.plane.send("t", receiver.plane.endpoints, COUNTS)
    sender.plane.push("t", WHOLE)
    sender.ends(code)
    assert receiver.told(Offered) == []
    assert untouched(receiver)


def test_pages_of_another_size_are_refused_even_under_the_same_digest(make: Callable[..., Peer]) -> None:
    groups = tuple(msgspec.structs.replace(g, head_dim=32) for g in LAYOUT.groups)
    sender, receiver = make(), make(layout=msgspec.structs.replace(LAYOUT, groups=groups))
    sender.plane.send("t", receiver.plane.endpoints, COUNTS)
    sender.ends("transfer_layout")


def test_an_engine_without_the_key_is_not_let_in(make: Callable[..., Peer]) -> None:
    for ways in ("shm", "tcp"):
        sender, receiver = make(ways, key=b"a key of somebody else"), make(ways)
        sender.plane.send("t", receiver.plane.endpoints, COUNTS)
        sender.ends("cluster_key")
        assert receiver.plane.counters.dropped == {"cluster_key": 1}


def test_the_next_endpoint_is_tried_where_one_cannot_be_reached(make: Callable[..., Peer]) -> None:
    sender, receiver = make("auto"), make("auto")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    bad = ("unix:elsewhere/xllm-kv-00", f"tcp:127.0.0.1:{port}", "mooncake:127.0.0.1:1", "nonsense")
    sender.plane.send("t", (*bad, *receiver.plane.endpoints), COUNTS)
    receiver.wait(Offered)
    sender.plane.send("u", bad, COUNTS)
    sender.ends("transfer_unreachable", "u")


def test_a_receiver_without_room_says_so(make: Callable[..., Peer]) -> None:
    sender, receiver = make(), make()
    sender.plane.send("t", receiver.plane.endpoints, COUNTS)
    receiver.wait(Offered)
    receiver.plane.refuse("t", ErrorInfo(kind="CapacityError", code="no_room", message="full"))
    sender.ends("no_room")
    sender.plane.send("u", receiver.plane.endpoints, (1000, 1))
    sender.ends("transfer_no_room", "u")
    assert [e.transfer_id for e in receiver.told(Offered)] == ["t"]


# -- damage --------------------------------------------------------------------------------------


def test_a_bit_that_flips_in_shared_pages_is_found_and_not_used(
    make: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = make(), make()
    fill(sender)
    write, flipped = Senders._write, []

    def spoil(self: Senders, out: object, part: object, slots: tuple[int, ...]) -> None:
        write(self, out, part, slots)  # type: ignore[arg-type]
        if self is sender.plane._senders and not flipped:
            receiver.memory.groups[0].pages[SLOTS[0][2], 77] ^= 4
            flipped.append(slots)

    monkeypatch.setattr(Senders, "_write", spoil)
    begin(sender, receiver)
    sender.plane.push("t", WHOLE)
    sender.plane.finish("t", MANIFEST)
    receiver.ends("transfer_corrupt")
    assert flipped
    assert receiver.told(Arrived) == []
    assert receiver.plane.counters.corrupt == 1
    sender.ends("transfer_corrupt")
    _still_works(sender, receiver)


@pytest.mark.parametrize("corrupt_after", [600, 3000, 20_000])
def test_a_bit_that_flips_on_the_network_is_found_and_not_used(
    make: Callable[..., Peer], proxy_to: Callable[[Peer], TcpProxy], corrupt_after: int
) -> None:
    sender, receiver = make("tcp"), make("tcp")
    fill(sender)
    proxy = proxy_to(receiver)
    proxy.set(Toxics(way="up", corrupt_after=corrupt_after))
    sender.plane.send("t", _at(proxy), COUNTS)
    receiver.wait(Offered)
    receiver.plane.accept("t", SLOTS)
    sender.plane.push("t", WHOLE)
    sender.plane.finish("t", MANIFEST)
    receiver.ends("transfer_corrupt")
    assert proxy.counts["corrupted"] > 0
    assert receiver.told(Arrived) == []
    assert untouched(receiver, SLOTS)
    sender.wait(Failed)
    sender.wait(Released)
    _still_works(sender, receiver)


# -- cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["offered", "accepted", "pushed", "finished"])
def test_a_connection_that_ends_fails_the_transfer_on_both_sides(
    make: Callable[..., Peer], proxy_to: Callable[[Peer], TcpProxy], moment: str
) -> None:
    """`finished`: after the last block, before its acknowledgement can come back."""
    sender, receiver = make("tcp"), make("tcp")
    fill(sender)
    proxy = proxy_to(receiver)
    sender.plane.send("t", _at(proxy), COUNTS)
    receiver.wait(Offered)
    if moment != "offered":
        receiver.plane.accept("t", SLOTS)
        wait_until(lambda: sender.plane.num_pending("t") == 0, "the yes arrives")
    if moment in ("pushed", "finished"):
        sender.plane.push("t", WHOLE)
        wait_until(lambda: same(sender, PAGES, receiver, SLOTS), "all pages are there")
    if moment == "finished":
        proxy.set(Toxics(way="down", blackhole=True))
        sender.plane.finish("t", MANIFEST)
        receiver.wait(Arrived)
        wait_until(lambda: proxy.counts["held"] > 0, "the acknowledgement is held up")
    assert proxy.cut(reset=True) == 1
    sender.ends("transfer_lost")
    if moment == "finished":
        assert receiver.told(Failed) == []
    else:
        receiver.ends("transfer_lost")
    proxy.set(HEALTHY)
    _still_works(sender, receiver)


@pytest.mark.parametrize("ways", ["shm", "tcp"])
def test_a_peer_that_ends_fails_the_transfer_here(make: Callable[..., Peer], ways: str) -> None:
    sender, receiver, third = make(ways), make(ways), make(ways)
    begin(sender, receiver)
    begin(sender, third, "u")
    sender.plane.push("t", WHOLE)
    receiver.plane.close()
    sender.ends("transfer_lost")
    sender.plane.close()
    third.ends("transfer_lost", "u")


@pytest.mark.parametrize("way", ["up", "down", "both"])
def test_a_route_that_swallows_everything_is_noticed_by_both(
    make: Callable[..., Peer], proxy_to: Callable[[Peer], TcpProxy], way: str
) -> None:
    sender, receiver = make("tcp", limits=QUICK), make("tcp", limits=QUICK)
    proxy = proxy_to(receiver)
    sender.plane.send("t", _at(proxy), COUNTS)
    receiver.wait(Offered)
    receiver.plane.accept("t", SLOTS)
    wait_until(lambda: sender.plane.num_pending("t") is not None, "the yes arrives")
    proxy.set(Toxics(way=way, blackhole=True))  # type: ignore[arg-type]
    for peer in (sender, receiver):
        assert peer.wait(Failed).error.code in ("transfer_timeout", "transfer_lost")
        peer.wait(Released)
    assert proxy.counts["held"] > 0
    assert untouched(receiver)


def test_an_idle_hour_between_two_transfers_is_not_silence(make: Callable[..., Peer]) -> None:
    hours = [0.0]
    sender, receiver = make(clock=lambda: time.perf_counter() + hours[0]), make()
    _still_works(sender, receiver)
    hours[0] = 3600.0
    _still_works(sender, receiver, "later")
    assert sender.told(Failed) == []


# -- cancel, and who may still write ---------------------------------------------------------------


@pytest.mark.parametrize("ways", ["shm", "tcp"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("moment", ["offered", "pushed"])
def test_a_cancel_frees_both_sides(make: Callable[..., Peer], ways: str, side: str, moment: str) -> None:
    sender, receiver = make(ways), make(ways)
    sender.plane.send("t", receiver.plane.endpoints, COUNTS)
    receiver.wait(Offered)
    if moment == "pushed":
        receiver.plane.accept("t", SLOTS)
        sender.plane.push("t", WHOLE)
        wait_until(lambda: sender.plane.num_pending("t") == 0, "all is pushed")
    who, other = (sender, receiver) if side == "sender" else (receiver, sender)
    who.plane.cancel("t")
    who.wait(Released)
    other.ends("transfer_cancelled")
    assert who.told(Failed) == []
    _still_works(sender, receiver)


def test_a_cancel_of_what_is_not_known_is_answered(make: Callable[..., Peer]) -> None:
    peer = make()
    peer.plane.cancel("never heard of")
    peer.wait(Released, "never heard of")
    peer.plane.pull("p", ("tcp:127.0.0.1:1",))
    peer.ends("transfer_unreachable", "p")


def test_shared_pages_stay_leased_until_the_sender_has_stopped(
    make: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender that is stopped in the middle of a copy writes on when it goes on."""
    sender, receiver = make(), make(limits=QUICK)
    fill(sender)
    write, gate, inside = Senders._write, [True], []

    def hang(self: Senders, out: object, part: object, slots: tuple[int, ...]) -> None:
        inside.append(slots)
        wait_until(lambda: not gate[0], "the sender goes on")
        write(self, out, part, slots)  # type: ignore[arg-type]

    monkeypatch.setattr(Senders, "_write", hang)
    begin(sender, receiver)
    sender.plane.push("t", WHOLE)
    wait_until(lambda: bool(inside), "a copy has begun")
    assert receiver.wait(Failed).error.code == "transfer_timeout"
    receiver.plane.cancel("t")  # even then
    receiver.plane.cancel("a later call")
    receiver.wait(Released, "a later call")
    assert len(receiver.told(Released)) == 1
    assert untouched(receiver)
    gate[0] = False
    receiver.wait(Released)
    written = [g.pages.copy() for g in receiver.memory.groups]
    sender.wait(Failed)
    sender.wait(Released)
    _still_works(sender, receiver, "u")
    assert any(w.any() for w in written)  # it did write after the failure, into pages still leased


def test_a_lease_that_its_sender_forgets_expires(make: Callable[..., Peer]) -> None:
    receiver = make(limits=replace(QUICK, lease_s=0.4, silent_s=10.0))
    hand = Hand(receiver)
    hand.say(_offer())
    receiver.wait(Offered)
    receiver.plane.accept("t", SLOTS)
    assert isinstance(hand.hear(Accept), Accept)
    hand.keep_alive = True
    assert hand.answers_until(lambda: bool(receiver.told(Failed))) > 0
    assert receiver.told(Failed)[0].error.code == "transfer_expired"
    hand.sock.close()
    receiver.wait(Released)


# -- garbage, lies, repetitions ----------------------------------------------------------------------


class Hand:
    """A peer made by hand, with the key; it says what it likes over the Unix endpoint, without a file."""

    def __init__(self, peer: Peer, key: bytes = b"a key that all of them have") -> None:
        name = peer.plane.endpoints[0].partition("/")[2]
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20.0)
        self.sock.connect("\0" + name)
        self.keep_alive = False
        shake = Handshake(Identity(role=INSTANCE, key=ClusterKey(key)), accepts=INSTANCE, connecting=True)
        encoder = msgspec.msgpack.Encoder()
        self.raw(frame(head := encoder.encode(shake.hello))[: FRAME.size] + head)
        while not shake.done:
            for answer in shake.feed(self.body()):
                head = encoder.encode(answer)
                self.raw(frame(head))

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def say(self, message: Message, payload: bytes = b"") -> None:
        self.raw(frame(encode(message), payload) + payload)

    def body(self) -> bytes:
        head, payload, _, _ = FRAME.unpack(self._exactly(FRAME.size))
        return self._exactly(head + payload)[:head]

    def hear(self, kind: type[Message]) -> Message:
        while True:
            message: Message = msgspec.msgpack.decode(self.body(), type=Message)
            if isinstance(message, kind):
                return message

    def answers_until(self, condition: Callable[[], bool]) -> int:
        """Answer every frame by the Pong that a ping deserves; how many were answered."""
        count = 0
        self.sock.settimeout(0.02)
        while not condition():
            try:
                self.body()
            except TimeoutError:
                continue
            count += 1
            head = msgspec.msgpack.encode({"type": "pong"})
            self.raw(frame(head))
        return count

    def ended(self) -> bool:
        """Whether the other side has closed."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += (more := self.sock.recv(count - len(data)))
            if not more:
                raise EOFError
        return data


def _offer(transfer_id: str = "t", **other: object) -> Offer:
    fields: dict[str, object] = {
        "transfer_id": transfer_id,
        "num_pages": COUNTS,
        "page_bytes": (16384, 8192),
        "page_size": 64,
        "numerics_class": KIND.numerics_class,
        "layout_digest": KIND.layout_digest,
    }
    return Offer(**(fields | other))  # type: ignore[arg-type]


@pytest.fixture
def leased(make: Callable[..., Peer]) -> tuple[Peer, Hand]:
    """A receiver whose pages lie in no file, so that its lease is filled by messages, and who fills it."""
    receiver = make(in_file=False)
    hand = Hand(receiver)
    hand.say(_offer())
    receiver.wait(Offered)
    receiver.plane.accept("t", SLOTS)
    hand.hear(Accept)
    return receiver, hand


def _data(**other: object) -> Data:
    fields: dict[str, object] = {"transfer_id": "t", "group": 0, "indices": (1,), "offset": 0, "length": 4}
    return Data(**(fields | other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lie",
    [
        _data(indices=(4,)),
        _data(indices=(-1,)),
        _data(group=2),
        _data(group=-1),
        _data(offset=16384),
        _data(offset=-4),
        _data(length=0),
        _data(length=5),
        _data(length=-4),
        _data(offset=1 << 40),
        _data(transfer_id="u"),
        Passed(transfer_id="t", group=0, indices=(1,), layer=2),
        Passed(transfer_id="t", group=0, indices=(1,), layer=-1),
        Passed(transfer_id="t", group=0, indices=(4,), layer=0),
        Passed(transfer_id="t", group=9, indices=(0,), layer=0),
        Wrote(transfer_id="t", group=0, indices=(0, 4), digests=(1, 2)),
        Wrote(transfer_id="t", group=0, indices=(0,), digests=()),
    ],
    ids=str,
)
def test_data_beyond_the_lease_is_refused(leased: tuple[Peer, Hand], lie: Message) -> None:
    receiver, hand = leased
    hand.say(lie, b"\xff" * 4 if isinstance(lie, Data) else b"")
    wait_until(lambda: receiver.plane.counters.refused_messages == 1, "it is refused")
    assert not any(group.pages.any() for group in receiver.memory.groups)


def _finish(**other: object) -> Finish:
    fields: dict[str, object] = {
        "transfer_id": "t",
        "digests": ((), ()),
        "manifest": msgspec.msgpack.encode(replace(MANIFEST, choices=())),
        "num_bytes": 0,
    }
    return Finish(**(fields | other))  # type: ignore[arg-type]


def _manifest(**other: object) -> bytes:
    return msgspec.msgpack.encode(replace(MANIFEST, choices=(replace(MANIFEST.choices[0], **other),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lie",
    [
        _finish(digests=()),
        _finish(digests=(((9, 1),), ())),
        _finish(manifest=b"\xc1"),
        _finish(manifest=msgspec.msgpack.encode([1])),
        _finish(manifest=_manifest(pages=((7,), ()))),
        _finish(manifest=_manifest(pages=((), ()), tokens=(-5,))),
        _finish(manifest=_manifest(pages=((), ()), num_computed=10_000)),
        _finish(manifest=_manifest(pages=((), (), ()))),
    ],
)
def test_an_end_that_cannot_be_meant_fails_the_transfer(leased: tuple[Peer, Hand], lie: Finish) -> None:
    receiver, hand = leased
    hand.say(lie)
    assert receiver.wait(Failed).error.code == "transfer_invalid"
    receiver.wait(Released)
    assert receiver.told(Arrived) == []


def test_repeated_and_reordered_data_do_no_harm_and_late_ones_are_refused(leased: tuple[Peer, Hand]) -> None:
    receiver, hand = leased
    rng = np.random.default_rng(5)
    content = rng.integers(0, 256, 16384, np.uint8).tobytes()
    parts = [(_data(offset=at, length=4096), content[at : at + 4096]) for at in range(0, 16384, 4096)]
    for i in (2, 0, 0, 3, 1, 2):
        hand.say(*parts[i])
    group = receiver.memory.groups[0]
    in_order = (content[at : at + n] for spans in group.spans for at, n in spans)
    from_sender = checksum(b"".join(in_order))
    for layer in (1, 0, 0):  # and layers that are told of out of order, and twice
        hand.say(Passed(transfer_id="t", group=0, indices=(1,), layer=layer))
    hand.say(Wrote(transfer_id="t", group=0, indices=(1,), digests=(from_sender,)))
    hand.say(_offer())  # again
    hand.say(_finish(digests=(((1, from_sender),), ())))
    receiver.wait(Arrived)
    assert receiver.memory.groups[0].pages[SLOTS[0][1]].tobytes() == content
    refused = receiver.plane.counters.refused_messages
    hand.say(_data(), b"late")
    hand.say(_finish())
    hand.say(_offer())
    wait_until(lambda: receiver.plane.counters.refused_messages == refused + 2, "what comes late is refused")
    assert len(receiver.told(Arrived)) == len(receiver.told(Offered)) == 1
    assert receiver.memory.groups[0].pages[SLOTS[0][1]].tobytes() == content


GARBAGE = {
    "noise": bytes(range(256)) * 8,
    "a head beyond all bounds": FRAME.pack(MAX_HEAD_BYTES + 1, 0, 0, 0),
    "a payload beyond all bounds": FRAME.pack(10, 1 << 31, 0, 0),
    "an empty head": FRAME.pack(0, 0, 0, 0),
    "an unknown tag": frame(msgspec.msgpack.encode({"type": "exec", "transfer_id": "t"})),
    "no message": frame(b"\xff\xff"),
    "an id without end": frame(encode(_offer("x" * 1000))),
    "a wrong checksum": FRAME.pack(4, 0, 1, 0) + b"\x80\x80\x80\x80",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_ends_the_connection_and_nothing_else(leased: tuple[Peer, Hand], what: str) -> None:
    receiver, hand = leased
    other = Hand(receiver)
    hand.raw(GARBAGE[what])
    assert hand.ended()
    receiver.ends("transfer_corrupt")
    assert sum(receiver.plane.counters.dropped.values()) == 1
    other.say(_offer("o"))
    receiver.wait(Offered, "o")


def test_strangers_reach_only_the_hand_shake(make: Callable[..., Peer]) -> None:
    receiver = make()
    name = receiver.plane.endpoints[0].partition("/")[2]
    for said in (frame(encode(_offer())), FRAME.pack(100_000, 0, 0, 0), FRAME.pack(8, 8, 0, 0)):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(20.0)
            stranger.connect("\0" + name)
            stranger.sendall(said)
            while stranger.recv(4096):
                pass
    assert receiver.plane.counters.dropped.total() == 3
    assert receiver.told(Offered) == []


def test_slots_that_do_not_exist_are_never_written_to(make: Callable[..., Peer]) -> None:
    """A receiver that names pages beyond its own file, or too few."""
    sender = make()
    for slots in (((8, 1, 2, 12), (10, 0)), ((8, 1, 2, -1), (10, 0)), ((8, 1, 2), (10, 0)), ((8,),)):
        receiver = make()
        sender.plane.send("t", receiver.plane.endpoints, COUNTS)
        receiver.wait(Offered)
        entry = receiver.plane._receivers.by_id["t"]
        entry.connection.send(
            Accept(
                transfer_id="t",
                slots=slots,
                way="shm",
                window=tuple((g.file_offset, g.num_pages) for g in receiver.memory.groups),
                has_fd=True,
            ),
            fd=receiver.memory.fd,
        )
        receiver.plane._links.wake()
        sender.plane.push("t", WHOLE)
        sender.ends("transfer_refused")
        assert untouched(receiver)


def test_pushes_of_pages_that_do_not_exist_fail_by_name(make: Callable[..., Peer]) -> None:
    for bad in (((4,), ()), ((0,), ())):
        sender, receiver = make(), make()
        begin(sender, receiver)
        page = 3 if bad[0] == (4,) else 99
        sender.plane.push("t", Pushed(indices=bad, pages=((page,), ())))
        sender.ends("internal_error")
        receiver.wait(Failed)
        receiver.wait(Released)


def test_memory_without_layers_is_pushed_when_the_step_has_ended(make: Callable[..., Peer]) -> None:
    layout = KVLayout(
        groups=(KVGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=16),), dtype="bfloat16"
    )
    sender, receiver = make(layout=layout), make(layout=layout)
    for group in sender.memory.groups:
        object.__setattr__(group, "spans", ())
    sender.plane.send("t", receiver.plane.endpoints, (1,))
    receiver.wait(Offered)
    receiver.plane.accept("t", ((5,),))
    sender.plane.push("t", Pushed(indices=((0,),), pages=((2,),), after_layer=True))
    sender.word.finished_layers = 1
    sender.memory.groups[0].pages[2] = 7
    sender.word.num_forwards = 1
    sender.plane.step_done()
    sender.plane.finish("t", replace(MANIFEST, choices=()))
    receiver.wait(Arrived)
    assert (receiver.memory.groups[0].pages[5] == 7).all()
