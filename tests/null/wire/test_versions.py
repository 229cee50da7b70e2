"""Neighbouring versions talk: a front of version 1 with this engine, this front with such an engine."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Callable

import msgspec
import pytest

from tests.null.wire import version_1 as v1
from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig
from xllm.engine import process
from xllm.engine.build import BuiltEngine
from xllm.engine.hub import Hub
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.instances.handshake import start_engine
from xllm.testing.fake_engine import sample_card
from xllm.testing.null_engine import null_engine, outputs, spec
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.types import SamplingParams, TokenSegment
from xllm.wire.codec import UnknownMessageError, WireError, decode_engine, decode_front
from xllm.wire.messages import WIRE_VERSION, Frame
from xllm.wire.stream import SocketEngineStream


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[socket.socket], threading.Thread]:
    """Runs this version's engine process, but for the process, over a socket."""
    engine = null_engine()
    engine.core.clock = SystemClock()
    built = BuiltEngine(
        core=engine.core, runner=engine.runner, memory=engine.memory, assets={}, report=("x",)
    )
    monkeypatch.setattr(process, "build_here", lambda *_: built)

    def start(sock: socket.socket) -> threading.Thread:
        def run() -> None:
            hub = Hub(None, SystemClock())
            session = hub.adopt(sock)
            hub.start()
            try:
                process._serve(hub, session, None, "warning")
            finally:
                hub.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    return start


def test_a_front_of_version_1_is_served_and_hears_nothing_that_it_does_not_know(
    serve: Callable[[socket.socket], threading.Thread],
) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(20.0)
    thread = serve(theirs)
    front = v1.FrontV1(ours)
    front.send(v1.Hello(), v1.Start(config=EngineConfig()))
    hello = front.receive()
    assert isinstance(hello, v1.Hello)
    assert hello.version == WIRE_VERSION
    assert isinstance(front.until(lambda m: isinstance(m, v1.Ready)), v1.Ready)
    prompt = tuple(range(3, 200))
    asked = v1.RequestSpec(
        request_id="r",
        model="null",
        segments=(TokenSegment(prompt),),
        params=SamplingParams(max_tokens=50, temperature=0.0, seed=1, ignore_eos=True),
    )
    front.send(v1.Submit(spec=asked))
    frames: list[v1.Frame] = []
    while not (frames and frames[-1].last):
        message = front.receive()
        if isinstance(message, v1.Frames):
            frames += message.frames
            front.send(v1.Committed(counts=(("r", 0, sum(len(f.tokens) for f in frames)),)))
    alone = null_engine()
    alone.core.submit(spec("r", prompt, max_tokens=50, ignore_eos=True))
    assert tuple(t for f in frames for t in f.tokens) == outputs(alone.run())["r", 0]
    # Two heartbeats of an idle engine: four pulses would have come meanwhile, and been refused.
    for _ in range(2):
        front.until(lambda m: isinstance(m, v1.Stats))
    ours.shutdown(socket.SHUT_RDWR)
    thread.join(20.0)
    assert not thread.is_alive()


async def test_this_front_uses_an_engine_of_version_1_and_tells_it_nothing_that_it_does_not_know() -> None:
    ours, theirs = socket.socketpair()
    files = tiny_assets(512)
    engine = v1.EngineV1(
        theirs, sample_card(files), {hashlib.sha256(d).hexdigest(): d for d in files.values()}
    )
    serving = asyncio.create_task(engine.serve())
    stream = await SocketEngineStream.over(ours)
    ready = await start_engine(stream, EngineConfig(), timeout_s=20.0)
    front = Front(FrontConfig(), None, SystemClock())
    await front.add_instance(stream, ready.card, name="old", max_reqs=ready.max_reqs)
    draft = RequestDraft(
        model="sample", prompt_token_ids=(70, 71, 72), params=SamplingParams(max_tokens=40, ignore_eos=True)
    )
    tokens = tuple([t async for delta in await front.submit(draft) for t in delta.token_ids])
    assert tokens == ((70, 71, 72) * 14)[:40]
    await front.close()
    await asyncio.wait_for(serving, 20.0)  # it decoded all it was sent
    assert {type(m) for m in engine.received} >= {v1.Hello, v1.Start, v1.Submit, v1.Committed}


async def test_this_front_skips_and_counts_what_a_newer_engine_says() -> None:
    ours, theirs = socket.socketpair()
    stream = await SocketEngineStream.over(ours)
    newer = msgspec.msgpack.encode({"type": "telegram", "text": "stop"})
    theirs.sendall(len(newer).to_bytes(4, "little") + newer)
    theirs.sendall(v1.encode(v1.Progress(stage="known")))
    message = await stream.receive()
    assert message is not None
    assert message.stage == "known"  # type: ignore[union-attr]
    assert stream.num_skipped == 1
    theirs.close()
    await stream.close()


@pytest.mark.parametrize("decode", [decode_front, decode_engine])
def test_a_known_tag_with_a_broken_body_is_no_newer_message(decode: Callable[[bytes], object]) -> None:
    for broken in ({"type": "hello", "version": "x"}, {"type": 5}, {}, []):
        with pytest.raises(WireError) as error:
            decode(msgspec.msgpack.encode(broken))
        assert not isinstance(error.value, UnknownMessageError)
    with pytest.raises(UnknownMessageError):
        decode(msgspec.msgpack.encode({"type": "telegram"}))


def test_fields_of_a_frame_keep_their_names() -> None:
    """Renaming one would drop it silently at a neighbour."""
    assert set(v1.Frame.__struct_fields__) <= set(Frame.__struct_fields__)
