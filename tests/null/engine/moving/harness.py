"""Two engines on the null device and a front that hands requests over between them, all in one thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec

from xllm.config import SchedulerConfig
from xllm.engine.kvtransfer.base import Sent, TransferEvent
from xllm.testing.fake_transfers import Wire
from xllm.testing.null_engine import FULL, NullEngine, check_under_way, null_engine
from xllm.types import FinishReason, KVGroup, RequestSpec
from xllm.wire.messages import Frame, Move, Moved


@dataclasses.dataclass
class Client:
    """What a front's journal has of one request."""

    spec: RequestSpec
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    logprobs: dict[int, list[object]] = dataclasses.field(default_factory=dict)
    reasons: dict[int, FinishReason] = dataclasses.field(default_factory=dict)
    prompt_logprobs: tuple[object, ...] = ()
    num_last: int = 0
    at: int = 0
    attempt: int = 0
    error: object = None

    def __post_init__(self) -> None:
        self.first_spec = self.spec

    def absorb(self, engine: int, frame: Frame) -> None:
        if engine != self.at or frame.attempt != self.attempt:
            return
        tokens = self.tokens.setdefault(frame.choice, [])
        if frame.tokens:
            assert frame.offset == len(tokens), (frame, tokens)
            tokens.extend(frame.tokens)
            self.logprobs.setdefault(frame.choice, []).extend(frame.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or frame.prompt_logprobs
        if frame.finish_reason is not None and frame.tokens:
            self.reasons[frame.choice] = frame.finish_reason
        self.error = self.error or frame.error
        self.num_last += frame.last

    def next_spec(self) -> RequestSpec:
        """The attempt after this one."""
        n = self.spec.params.n
        params = self.spec.params
        if self.prompt_logprobs:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(
            self.spec,
            params=params,
            attempt=self.attempt + 1,
            emitted=tuple(tuple(self.tokens.get(i, ())) for i in range(n)),
            ended=tuple(sorted(self.reasons)),
        )


class Pair:
    """`engines` joined by `wire`. Every method leaves all pools checked."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        groups: tuple[KVGroup, ...] = (FULL,),
        config: SchedulerConfig | None = None,
        caching: bool = True,
        num_engines: int = 2,
        early: bool = False,
        lookahead: bool = False,
    ) -> None:
        """`early`: a success is answered by the transfers' thread, before the step thread knows of it."""
        self.early = early
        self.wire = Wire()
        self.engines: list[NullEngine] = [
            null_engine(
                num_pages=num_pages,
                groups=groups,
                config=config,
                enable_prefix_caching=caching,
                wire=self.wire,
                name=str(i),
                lookahead=lookahead,
            )
            for i in range(num_engines)
        ]
        self.clients: dict[str, Client] = {}
        self.moved: list[Moved] = []
        self.pages_per_turn: int | None = None
        self.late_credit = False
        self.alter: Callable[[TransferEvent], TransferEvent] = lambda event: event
        self._pull: set[str] = set()
        self._targets: dict[str, int] = {}
        self.num_moves = 0

    # -- the front ------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, at: int = 0) -> Client:
        client = self.clients[spec.request_id] = Client(spec, at=at)
        self.engines[at].core.submit(spec)
        return client

    def move(self, request_id: str, to: int | None = None, pull: bool = False) -> str:
        client = self.clients[request_id]
        to = 1 - client.at if to is None else to
        transfer_id = f"t{self.num_moves}"
        self.num_moves += 1
        self._targets[transfer_id] = to
        transfers = self.engines[to].transfers
        assert transfers is not None
        self.engines[client.at].core.mover.move(
            0,
            Move(
                request_id=request_id,
                attempt=client.attempt,
                transfer_id=transfer_id,
                endpoints=transfers.endpoints,
                mode="pull" if pull else "push",
            ),
            self.now_s,
        )
        if pull:
            self._pull.add(transfer_id)
        return transfer_id

    def switch(self, moved: Moved) -> None:
        """The request goes on at the move's target; the old attempt is ended after that."""
        client = self.clients[moved.request_id]
        source, to = client.at, self._targets[moved.transfer_id]
        spec = client.next_spec()
        client.at, client.attempt = to, spec.attempt
        client.spec = spec
        sources: tuple[str, ...] = ()
        transfers = self.engines[source].transfers
        if moved.transfer_id in self._pull and transfers is not None:
            sources = transfers.endpoints
        self.engines[to].core.submit(spec, transfer_id=moved.transfer_id, sources=sources)
        self.engines[source].core.abort(spec.request_id)

    # -- time -------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self.engines[0].clock.monotonic_s()

    def pass_time(self, seconds: float) -> None:
        for engine in self.engines:
            engine.clock.advance(seconds)

    def hand_on(self) -> None:
        """All events that wait, in order, each followed by a check of the pools."""
        for engine in self.engines:
            transfers = engine.transfers
            assert transfers is not None
            while transfers.events:
                event = self.alter(transfers.events.popleft())
                answer = None
                if self.early and isinstance(event, Sent):
                    answer = engine.core.mover.answer_early(event)
                engine.core.on_event(event)
                engine.memory.check()
                if answer is not None:
                    self.heard(answer[1])

    @staticmethod
    def check_load(engine: NullEngine) -> None:
        """What routers are told equals what a walk over all sequences finds."""
        scheduler = engine.core.scheduler
        sequences = scheduler.sequences
        told = scheduler.snapshot()
        assert told.backlog_tokens == sum(s.behind for s in sequences if s.behind > 1)
        assert told.decode_context == sum(len(s.tokens) for s in sequences if s.behind <= 1)

    def turn(self) -> None:
        """Each engine does one step; then the wire, up to `pages_per_turn` things; then the front."""
        for number, engine in enumerate(self.engines):
            _, frames = engine.core.step()
            for frame in frames:
                if frame.request_id in self.clients:
                    self.clients[frame.request_id].absorb(number, frame)
                if not self.late_credit:
                    engine.core.scheduler.committed(
                        frame.request_id, frame.choice, frame.offset + len(frame.tokens)
                    )
            engine.memory.check()
            check_under_way(engine)
            self.check_load(engine)
        self.wire.run(self.pages_per_turn)
        self.hand_on()
        for engine in self.engines:
            for _, moved in engine.core.mover.take_answers():
                self.heard(moved)

    def heard(self, moved: Moved) -> None:
        self.moved.append(moved)
        client = self.clients[moved.request_id]
        if moved.error is None and moved.attempt == client.attempt and not client.num_last:
            self.switch(moved)

    def until(self, condition: Callable[[], bool], max_turns: int = 2000) -> None:
        for _ in range(max_turns):
            if condition():
                return
            self.turn()
        raise AssertionError(f"not within {max_turns} turns")

    def finish(self) -> None:
        """Until everything has ended, with nothing left behind on any engine."""
        self.until(lambda: not any(e.core.has_requests for e in self.engines))
        self.settle()

    def settle(self) -> None:
        self.turn()
        self.pass_time(11.0)
        for engine in self.engines:
            engine.core.step()
            self.wire.run()
            self.hand_on()
            engine.core.step()
            self.engines_are_empty(engine)

    @staticmethod
    def engines_are_empty(engine: NullEngine) -> None:
        counts = engine.memory.counts()
        assert (counts.owned, counts.in_transfer) == (0, 0), counts
        assert counts.free + counts.reusable == counts.total
        assert not engine.core.mover.is_waiting
        engine.memory.check()
