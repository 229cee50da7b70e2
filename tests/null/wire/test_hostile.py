"""Whatever comes to an instance's port, its fronts and itself live on, and what was dropped is counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import psutil
import pytest

from tests.null.wire.peers import FrontEnd, RawPeer, frame, join
from xllm.config import ClusterConfig
from xllm.engine.link import LinkLimits
from xllm.engine.plan import SequencePlan
from xllm.engine.server import InstanceServer
from xllm.testing.instance_thread import null_instance
from xllm.testing.null_engine import null_engine, spec
from xllm.wire.codec import encode
from xllm.wire.hello import FRONT, Identity
from xllm.wire.messages import AssetRequest, Committed, Hello, Submit

BIG = "big"
QUICK = LinkLimits(handshake_s=0.2, frame_s=0.2, stall_s=0.2, max_sessions=3, max_handshakes=4)

Attack = Callable[[RawPeer], None]


def _join_and(data: bytes) -> Attack:
    def attack(peer: RawPeer) -> None:
        peer.join()
        peer.send(data)

    return attack


def _send(data: bytes) -> Attack:
    return lambda peer: peer.send(data)


def _leave(peer: RawPeer) -> None:
    peer.close()


def _reset(peer: RawPeer) -> None:
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


HELLO = encode(Hello(role=FRONT, cluster="default", incarnation="x", nonce=b"n" * 16))
LONG_PROMPT = Submit(spec=spec("r", (1,) * 500_000))

STRANGERS: dict[str, tuple[str, Attack]] = {
    "http": ("wire_error", _send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
    "tls": ("wire_error", _send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64))),
    "4 GiB": ("wire_error", _send(b"\xff\xff\xff\xff")),
    "just too long": ("wire_error", _send(struct.pack("<I", 4097))),
    "empty frame": ("bad_hello", _send(frame(b""))),
    "garbage": ("bad_hello", _send(frame(b"\xc1\xc1\xc1"))),
    "nested": ("bad_hello", _send(frame(b"\x91" * 4000))),
    "a request first": ("bad_hello", _send(encode(Submit(spec=spec("r", (1,)))))),
    "wrong role": ("wrong_role", _send(encode(Hello(role="x", incarnation="x", nonce=b"n" * 16)))),
    "old version": ("wire_version", _send(encode(Hello(version=1)))),
    "a proof first": ("bad_hello", _send(frame(msgspec.msgpack.encode({"type": "proof", "mac": b"x" * 32})))),
    "hello and no proof": ("cluster_key", _send(HELLO + frame(
        msgspec.msgpack.encode({"type": "proof", "mac": b"x" * 32})
    ))),
    "left": ("handshake_ended", _leave),
    "reset": ("handshake_ended", _reset),
    "silent": ("handshake_timeout", lambda peer: None),
    "half a header": ("handshake_timeout", _send(b"\x10\x00")),
    "half a hello": ("handshake_timeout", _send(HELLO[:-5])),
    "hello and silence": ("handshake_timeout", _send(HELLO)),
}  # fmt: skip

MEMBERS: dict[str, tuple[str, Attack]] = {
    "4 GiB": ("wire_error", _join_and(b"\xff\xff\xff\xff")),
    "garbage": ("wire_error", _join_and(frame(b"\xc1\xc1\xc1"))),
    "nested": ("wire_error", _join_and(frame(b"\x91" * 1_000_000))),
    "nested in a field": ("wire_error", _join_and(frame(
        b"\x82\xa4type\xa5drain\xa1x" + b"\x91" * 1_000_000
    ))),
    "wrong types": ("wire_error", _join_and(frame(msgspec.msgpack.encode({"type": "submit", "spec": 1})))),
    "too long": ("wire_error", _join_and(struct.pack("<I", 17 << 20))),
    "cut off": ("frame_timeout", _join_and(encode(LONG_PROMPT)[:-1])),
}  # fmt: skip


@pytest.fixture
async def server() -> AsyncIterator[InstanceServer]:
    made = null_instance(limits=QUICK, assets={BIG: bytes(1 << 20)})
    yield made
    made.stop()
    assert await asyncio.to_thread(made.wait, 20.0) == 0


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def works(front: FrontEnd, request_id: str, num_tokens: int = 40) -> None:
    """A request of this front goes through as it would alone."""
    asked = spec(request_id, tuple(range(3, 99)), max_tokens=num_tokens, ignore_eos=True)
    await front.submit(asked)
    await front.until_last(request_id)
    alone = null_engine()
    alone.core.submit(asked)
    assert front.tokens(request_id) == tuple(t for f in alone.run() for t in f.tokens)


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_stranger_is_dropped_by_name_and_the_front_is_served_on(
    server: InstanceServer, name: str
) -> None:
    front = await join(server)
    await works(front, "before")
    cause, attack = STRANGERS[name]
    with contextlib.closing(RawPeer(server.address)) as peer:
        await asyncio.to_thread(attack, peer)
        await until(lambda: server.counters.dropped[cause] == 1)
        assert server.counters.num_dropped == 1
        await works(front, "after")
    assert front.messages[-1].snapshot.num_dropped_peers == 1  # type: ignore[union-attr]
    await front.stream.close()


@pytest.mark.parametrize("name", MEMBERS)
async def test_a_member_that_breaks_the_protocol_is_dropped_alone(server: InstanceServer, name: str) -> None:
    front = await join(server)
    cause, attack = MEMBERS[name]
    with contextlib.closing(RawPeer(server.address)) as peer:
        await asyncio.to_thread(attack, peer)
        await until(lambda: server.counters.dropped[cause] == 1)
        await works(front, "after")
    await front.stream.close()


async def test_the_reason_reaches_whoever_was_refused() -> None:
    server = null_instance(cluster=ClusterConfig(cluster="mine"))
    with contextlib.closing(RawPeer(server.address)) as peer:
        peer.hello()
        peer.send(HELLO)
        assert await asyncio.to_thread(peer.refusal) == "wrong_cluster"
    server.stop()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_a_message_of_a_newer_version_is_skipped_and_counted(server: InstanceServer) -> None:
    front = await join(server)
    newer = frame(msgspec.msgpack.encode({"type": "sing", "song": [1, 2]}))
    front.stream._writer.write(newer + newer)
    await works(front, "after")
    assert server.counters.num_skipped == 2
    assert server.counters.num_dropped == 0
    await front.stream.close()


async def test_a_flood_of_rubbish_takes_no_memory(server: InstanceServer) -> None:
    front = await join(server)
    payloads = [frame(b"\x91" * 4000), b"\xff\xff\xff\xff" + bytes(8000), bytes(60_000), HELLO * 3]

    def flood(count: int) -> None:
        for i in range(count):
            with contextlib.closing(RawPeer(server.address)) as peer, contextlib.suppress(ConnectionError):
                peer.send(payloads[i % len(payloads)])

    await asyncio.to_thread(flood, 40)  # what the allocator keeps for the first ones does not count
    before = psutil.Process().memory_info().rss
    await asyncio.to_thread(flood, 160)
    await until(lambda: server.counters.num_dropped >= 200)
    assert psutil.Process().memory_info().rss - before < 16 << 20
    await works(front, "after")
    await front.stream.close()


async def test_there_are_only_so_many_fronts_and_hand_shakes(server: InstanceServer) -> None:
    fronts = [await join(server) for _ in range(QUICK.max_sessions)]
    with contextlib.closing(RawPeer(server.address)) as peer:
        assert await asyncio.to_thread(peer.body) is None
    assert server.counters.dropped["too_many_fronts"] == 1
    await fronts.pop().stream.close()
    peers = [RawPeer(server.address) for _ in range(QUICK.max_handshakes + 2)]
    await until(lambda: server.counters.dropped["too_many_handshakes"] >= 1)
    # An honest one still gets in: it is the oldest that has to go.
    fronts.append(await join(server))
    for peer in peers:
        peer.close()
    for front in fronts:
        await works(front, "r")
        await front.stream.close()


async def test_a_front_that_does_not_read_is_dropped_when_it_is_owed_too_much(
    server: InstanceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xllm.engine.session.MAX_OUTBOX_BYTES", 4 << 20)
    front = await join(server)
    with contextlib.closing(RawPeer(server.address)) as peer:
        peer.join()
        peer.say(*[AssetRequest(digest=BIG)] * 32)
        await until(lambda: server.counters.dropped["slow_reader"] == 1)
        await works(front, "after")
    await front.stream.close()


async def test_a_front_that_does_not_read_is_dropped_after_a_while(server: InstanceServer) -> None:
    front = await join(server)
    with contextlib.closing(RawPeer(server.address)) as peer:
        peer.join()
        peer.say(*[AssetRequest(digest=BIG)] * 16)
        await until(lambda: server.counters.dropped["slow_reader"] == 1)
        await works(front, "after")
    await front.stream.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed: the step thread hangs in its step."""
    event = threading.Event()
    yield event
    event.set()


async def test_what_the_step_thread_has_not_taken_is_bounded(gate: threading.Event) -> None:
    engine = null_engine()
    hanging = threading.Event()

    def hang(entry: SequencePlan) -> None:
        hanging.set()
        gate.wait(20.0)

    engine.runner.fault = hang
    limits = LinkLimits(max_unread=50)
    server = null_instance(engine, limits=limits)
    front = await join(server)
    await front.submit(spec("r", (1, 2, 3), max_tokens=2, ignore_eos=True))
    assert await asyncio.to_thread(hanging.wait, 20.0)
    many, inbox = 20_000, server._hub.inbox
    with contextlib.closing(RawPeer(server.address)) as peer:
        peer.shake_hands(Identity(role=FRONT))
        flooding = asyncio.create_task(
            asyncio.to_thread(peer.say, *[Committed(counts=(("x", 0, i),)) for i in range(many)])
        )
        await until(lambda: inbox.qsize() > limits.max_unread)
        # What one read brought may still be put in, and no more.
        sizes = set()
        for _ in range(20):
            await asyncio.sleep(0.005)
            sizes.add(inbox.qsize())
        assert max(sizes) < 4000
        gate.set()
        await flooding
        (session,) = [s for s in server._hub._links if s.taken > 100 or s.resume_at]
        await until(lambda: session.taken == many)
    await front.until_last("r")
    await front.stream.close()
    server.stop()
    assert await asyncio.to_thread(server.wait, 20.0) == 0


async def test_without_descriptors_nobody_new_is_let_in_until_there_are_some_again(
    server: InstanceServer, caplog: pytest.LogCaptureFixture
) -> None:
    front = await join(server)
    peer = RawPeer(server.address, socket.socket())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fill = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:  # until every number below the limit is taken
                fill.append(os.dup(0))
        peer.connect()
        await until(lambda: "cannot accept" in caplog.text)
        await works(front, "meanwhile")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fill:
            os.close(fd)
    assert (await asyncio.to_thread(peer.hello))[0].role == "instance"
    peer.close()
    await front.stream.close()
