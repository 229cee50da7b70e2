"""A running sequence moved between two engines of a platform, over their real data planes: the same bits.

As `tests/exactness.py`: every run keeps a digest of the full float32 logits row behind each drawn token. A
platform's test module makes the engines.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from xllm.arch import ArchConfig
from xllm.artifacts.source import DummySource
from xllm.clock import SystemClock
from xllm.config.schema import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    PlatformConfig,
    SchedulerConfig,
    TransferConfig,
)
from xllm.engine.core import EngineCore
from xllm.engine.executor import InProcExecutor
from xllm.engine.kvtransfer.base import TransferEvent
from xllm.engine.kvtransfer.opening import open_plane, pages_for_peers, peer_identity
from xllm.engine.kvtransfer.plane import DataPlane
from xllm.engine.memory.manager import PageManager
from xllm.engine.platform.base import KeepsPages, Platform
from xllm.engine.progress import StepProgress
from xllm.engine.sampling import Sampler
from xllm.engine.scheduler.order import create_order
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.testing.null_engine import null_card
from xllm.types import RequestSpec
from xllm.wire.messages import Move, Moved

NUM_PAGES = 40
MAX_LEN = 512
LOOK_S = 0.02
"""A sender hears nothing of a receiver's yes, it has to look."""
Rows = dict[tuple[int, int], str]
"""(choice, position) → digest of the logits there."""


@dataclass
class Engine:
    core: EngineCore
    memory: PageManager
    plane: DataPlane
    commits: bool = True
    """Not while a move is under way: steps of so small a model may be faster than a connection, and a
    sequence without credit waits for it."""
    rows: Rows = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def step(self) -> bool:
        ran, frames = self.core.step()
        for frame in frames:
            assert frame.error is None, frame.error
            tokens = self.tokens.setdefault(frame.choice, [])
            tokens.extend(frame.tokens)
            if self.commits:
                self.core.scheduler.committed(
                    frame.request_id, frame.choice, frame.offset + len(frame.tokens)
                )
        self.memory.check()
        return ran


class Events:
    """Of all engines of a test, in one queue."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, TransferEvent]] = queue.SimpleQueue()

    def teller(self, number: int) -> Callable[[TransferEvent], None]:
        return lambda event: self._queue.put((number, event))

    def hand_on(self, engines: list[Engine], wait: bool) -> None:
        """All that there are; with `wait` something may come in a moment, and nothing else goes on."""
        try:
            number, event = self._queue.get(block=wait, timeout=LOOK_S)
            while True:
                engines[number].core.on_event(event)
                number, event = self._queue.get_nowait()
        except queue.Empty:
            return


def make_engines(
    platform: Platform, arch: ArchConfig, threads: tuple[int, ...], **how
) -> tuple[list[Engine], Events]:
    events = Events()
    made = [
        make_engine(platform, arch, num_threads=count, tell=events.teller(i), **how)
        for i, count in enumerate(threads)
    ]
    return made, events


def make_engine(
    platform: Platform,
    arch: ArchConfig,
    *,
    transfer: str,
    budget: int,
    caching: bool,
    num_threads: int,
    tell: Callable[[TransferEvent], None],
    kv_memory: str = "auto",
) -> Engine:
    config = EngineConfig(
        model=ModelConfig(model="tiny", max_model_len=MAX_LEN),
        cache=CacheConfig(num_pages=NUM_PAGES, enable_prefix_caching=caching, kv_memory=kv_memory),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget),
        platform=PlatformConfig(num_threads=num_threads),
        transfer=TransferConfig(transfer=transfer),  # type: ignore[arg-type]
    )
    shared = pages_for_peers(config.transfer)
    if shared is not None and isinstance(platform, KeepsPages):
        platform = platform.over(shared)
    built = platform.create_runner(arch, DummySource(arch), config, MAX_LEN, Sampler())
    runner = built.runner
    memory = PageManager(runner.kv_layout.groups, built.num_pages, caching)
    if built.mapper is not None:
        memory.map_into(built.mapper)
    card = msgspec.structs.replace(
        null_card(sum(built.num_pages), MAX_LEN),
        vocab_size=arch.vocab_size,
        head_width=arch.vocab_size,
        eos_token_ids=arch.eos_token_ids,
        numerics_class="tiny",
        kv_layout_digest=runner.kv_layout.digest(),
    )
    scheduler = Scheduler(
        config.scheduler,
        memory,
        create_order("fcfs"),
        numerics_class=card.numerics_class,
        max_model_len=MAX_LEN,
        eos_token_ids=arch.eos_token_ids,
    )
    core = EngineCore(
        card,
        scheduler,
        memory,
        InProcExecutor(runner),
        SystemClock(),
        progress=StepProgress(lambda: runner.finished_layers),
    )
    plane = open_plane(
        config.transfer, card, runner.kv_memory(shared), peer_identity(b"k" * 32), tell, runner
    )
    assert plane is not None
    core.join(plane)
    engine = Engine(core, memory, plane)

    def tap(seq_id: int, position: int, logits: np.ndarray) -> None:
        origin = scheduler.origin_of(seq_id)
        assert origin is not None
        digest = hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()
        engine.rows[origin[1], position] = digest

    runner.logits_tap = tap  # type: ignore[attr-defined]
    return engine


def unmoved(engine: Engine, of: RequestSpec) -> tuple[Rows, dict[int, list[int]]]:
    """The request on one engine, under another salt: it shares no page with later runs."""
    engine.core.submit(msgspec.structs.replace(of, cache_salt="unmoved"))
    while engine.core.has_requests:
        engine.step()
    rows, tokens = engine.rows, engine.tokens
    engine.rows, engine.tokens = {}, {}
    return rows, tokens


def moved(
    engines: list[Engine], events: Events, of: RequestSpec, after: list[int], mode: str
) -> tuple[Rows, dict[int, list[int]], list[Moved]]:
    """The same, moved to the next engine in turn each time choice 0 has as many tokens as `after` says."""
    at, spec = 0, of
    answers: list[Moved] = []
    engines[0].core.submit(spec)
    waiting = list(after)
    tokens: dict[int, list[int]] = {}
    rows: Rows = {}
    under_way = False

    def gather() -> None:
        for engine in engines:
            for key, digest in engine.rows.items():
                assert rows.setdefault(key, digest) == digest
            for choice, drawn in engine.tokens.items():
                tokens.setdefault(choice, []).extend(drawn)
            engine.rows, engine.tokens = {}, {}

    while any(e.core.has_requests for e in engines):
        here, there = engines[at], engines[(at + 1) % len(engines)]
        if waiting and not under_way and len(tokens.get(0, ())) >= waiting[0]:
            waiting.pop(0)
            under_way, here.commits = True, False
            move = Move(
                request_id=spec.request_id,
                attempt=spec.attempt,
                transfer_id=f"{spec.request_id}-{len(answers)}",
                endpoints=there.plane.endpoints,
                mode=mode,
            )
            here.core.mover.move(0, move, 0.0)
        ran = [e.step() for e in engines]
        gather()
        fresh = here.core.mover.take_answers()
        events.hand_on(engines, wait=not any(ran) and not fresh)
        for _, answer in fresh:
            answers.append(answer)
            assert answer.error is None, answer.error
            gather()
            spec = msgspec.structs.replace(
                spec,
                attempt=spec.attempt + 1,
                emitted=tuple(tuple(tokens.get(i, ())) for i in range(spec.params.n)),
            )
            there.core.submit(
                spec,
                transfer_id=answer.transfer_id,
                sources=here.plane.endpoints if mode == "pull" else (),
            )
            here.core.abort(spec.request_id)
            at, under_way, here.commits = (at + 1) % len(engines), False, True
    while any(e.core.mover.is_waiting for e in engines):
        events.hand_on(engines, wait=True)
        for engine in engines:
            engine.step()
    return rows, tokens, answers
