"""The message loop with moves: answers come after the frames, events come through the inbox."""

from __future__ import annotations

import queue

from xllm.engine.loop import EngineLoop
from xllm.engine.port import Inbox
from xllm.testing.fake_transfers import FakeTransfers, Wire
from xllm.testing.null_engine import NullEngine, null_engine, outputs, spec
from xllm.wire.messages import (
    WIRE_VERSION,
    Abort,
    CancelTransfer,
    Committed,
    EngineMessage,
    Fetch,
    Frames,
    Move,
    Moved,
    Ready,
    Submit,
)

PROMPT = tuple(range(10, 210))


class Script:
    """A front's port in the loop's own thread: each message drives wire, peer and front."""

    number = 3
    version = WIRE_VERSION
    pulsing = False

    def __init__(self, here: NullEngine, there: NullEngine, wire: Wire) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.here, self.there, self.wire = here, there, wire
        self.got: list[EngineMessage] = []
        self.num_tokens = 0

    def send(self, message: EngineMessage) -> None:
        self.got.append(message)
        if isinstance(message, Frames):
            for frame in message.frames:
                self.num_tokens += len(frame.tokens)
                self.inbox.put((self, Committed(counts=((frame.request_id, frame.choice, self.num_tokens),))))
                if frame.last:
                    self.inbox.put((None, None))
        self.pump()
        if isinstance(message, Moved):
            self.inbox.put((self, Abort(request_id=message.request_id)))

    def pump(self) -> None:
        here, there = self.here.transfers, self.there.transfers
        assert isinstance(here, FakeTransfers)
        assert isinstance(there, FakeTransfers)
        for _ in range(3):
            self.wire.run()
            while there.events:
                self.there.core.on_event(there.events.popleft())
            while here.events:
                self.inbox.put((None, here.events.popleft()))

    def took(self) -> None:
        self.pump()

    def end(self) -> None:
        return


def run(*messages) -> Script:
    wire = Wire()
    here, there = null_engine(wire=wire, name="0"), null_engine(wire=wire, name="1")
    script = Script(here, there, wire)
    for message in messages:
        script.inbox.put((script, message))
    loop = EngineLoop(
        here.core, {}, script.inbox, Ready(card=here.core.card, pid=0), parent=script, grace_s=1.0
    )
    loop.run()
    here.memory.check()
    return script


def test_the_answer_follows_the_frames_of_all_tokens_drawn() -> None:
    of = spec("a", PROMPT, max_tokens=40, ignore_eos=True)
    script = run(Submit(spec=of), Move(request_id="a", attempt=0, transfer_id="t", endpoints=("fake:1",)))
    moved = next(m for m in script.got if isinstance(m, Moved))
    assert moved.error is None
    assert moved.num_bytes > 0
    after = script.got[script.got.index(moved) :]
    assert not [f for m in after if isinstance(m, Frames) for f in m.frames if f.tokens]
    before = [f for m in script.got if isinstance(m, Frames) for f in m.frames]
    drawn = outputs(before)["a", 0]
    there = script.there
    there.core.submit(
        spec("a", PROMPT, max_tokens=40, ignore_eos=True, emitted=(drawn,), attempt=1), transfer_id="t"
    )
    assert there.core.mover.counters.claimed_rows == len(PROMPT) + len(drawn) - 1
    rest = [t for f in there.run() for t in f.tokens]
    alone = null_engine()
    alone.core.submit(of)
    assert (*drawn, *rest) == outputs(alone.run())["a", 0]
    snapshot = script.here.core.snapshot()
    assert (snapshot.num_moved_out, snapshot.num_failed_moves) == (1, 0)
    assert snapshot.sent_bytes == moved.num_bytes > 0
    assert (snapshot.owned_pages, snapshot.transfer_pages) == (0, 0)


def test_a_fetch_is_pulled_and_a_cancel_ends_it() -> None:
    of = spec("a", PROMPT, max_tokens=4, ignore_eos=True)
    fetch = Fetch(transfer_id="f", sources=("fake:1",), root=b"r" * 16, digests=(b"d" * 16,))
    script = run(fetch, CancelTransfer(transfer_id="f"), Submit(spec=of, transfer_id="f"))
    assert script.num_tokens == 4
    assert script.here.core.snapshot().transfer_pages == 0


def test_a_waiting_request_is_computed_when_the_peer_has_nothing() -> None:
    """Nothing runs while it waits: the event must wake the loop."""
    of = spec("a", PROMPT, max_tokens=4, ignore_eos=True)
    script = run(Submit(spec=of, transfer_id="p", sources=("fake:1",)))
    assert script.num_tokens == 4
    assert script.here.core.snapshot().num_failed_moves == 1
