"""`SampleEngine`: an engine without a model, over a memory stream, under a test's control.

It keeps the engine's side of the contract (credit window, abort, n, one terminal frame per
request, a move holds once every choice has drawn a token) and says what the test's script says. No
scheduler, no pages, no torch: what was "moved" here is computed there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from xllm.errors import ErrorInfo
from xllm.testing.memory_stream import memory_pair
from xllm.types import EngineSnapshot, FinishReason, ModelCard, RequestSpec, SamplingParams
from xllm.wire.messages import (
    CREDIT_WINDOW,
    Abort,
    Asset,
    AssetRequest,
    Attach,
    CancelTransfer,
    Committed,
    Drain,
    EngineMessage,
    Frame,
    Frames,
    FrontMessage,
    Hello,
    Move,
    Moved,
    Ready,
    Start,
    Submit,
)

CANCELLED = ErrorInfo(kind="UnavailableError", code="cancelled", message="the transfer was given up")
UNKNOWN = ErrorInfo(kind="NotFoundError", code="not_found", message="there is no such request here")

Script = Callable[[RequestSpec, int], Sequence[int]]
"""(spec, choice) → the tokens the choice would say if nothing stopped it."""


def echo(spec: RequestSpec, choice: int) -> Sequence[int]:
    """The prompt over and over; choice c starts c tokens in."""
    length = spec.params.max_tokens or 0
    return list(islice(cycle(spec.prompt_token_ids), choice, choice + length))


def sample_card(
    assets: Mapping[str, bytes], *, model_id: str = "sample", max_model_len: int = 1024
) -> ModelCard:
    """A card that fits `assets` of `tiny_assets(512)`; EOS is 2, digests are SHA-256."""
    return ModelCard(
        model_id=model_id,
        aliases=(),
        architecture="sample",
        weights_digest="0",
        dtype="float32",
        vocab_size=512,
        head_width=512,
        max_model_len=max_model_len,
        eos_token_ids=(2,),
        assets={name: hashlib.sha256(data).hexdigest() for name, data in assets.items()},
        kv_layout_digest="0",
        numerics_class="sample",
        deterministic=True,
        page_size=64,
        num_pages=64,
    )


@dataclass(slots=True)
class _Choice:
    script: Sequence[int]
    num_out: int = 0
    num_committed: int = 0
    ended: bool = False


@dataclass(slots=True)
class _Request:
    """`move` is under way; `num_before` = tokens said when it came. `holds`: it was answered."""

    spec: RequestSpec
    choices: list[_Choice] = field(default_factory=list)
    move: Move | None = None
    num_before: tuple[int, ...] = ()
    holds: bool = False


class SampleEngine:
    """Runs as a task. `auto` = steps whenever something can run; otherwise the test calls `step`."""

    def __init__(
        self,
        card: ModelCard,
        assets: Mapping[str, bytes],
        *,
        script: Script = echo,
        auto: bool = True,
        tokens_per_step: int = 1,
    ) -> None:
        self.card = card
        self.stream, self._end = memory_pair()
        self.received: list[FrontMessage] = []
        self.num_steps = 0
        self.refusal: ErrorInfo | None = None
        self.draining = False
        self.move_error: ErrorInfo | None = None
        """What moves end with instead of a success."""
        self.hands_over = True
        """Off: moves are not answered, until it is on again."""
        self._assets = {card.assets[name]: data for name, data in assets.items()}
        self._script = script
        self._auto = auto
        self._tokens_per_step = tokens_per_step
        self._requests: dict[str, _Request] = {}
        self._num_out: Counter[tuple[str, int]] = Counter()
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._run(), name=f"sample engine {card.model_id}")

    # -- what a test asks and does ----------------------------------------------------------------

    async def saw(self, kind: type[FrontMessage], count: int = 1) -> list[FrontMessage]:
        """Wait until `count` messages of that type have arrived; all of them so far."""
        async with self._news:
            await self._news.wait_for(lambda: len(self._of(kind)) >= count)
        return self._of(kind)

    def num_out(self, request_id: str, choice: int = 0) -> int:
        """Tokens said so far by a choice, also after its end; 0 for an unknown request."""
        return self._num_out[request_id, choice]

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._requests)

    def step(self) -> bool:
        """Advance every choice that has credit; False when none has."""
        frames = [f for request in tuple(self._requests.values()) for f in self._advance(request)]
        if frames:
            self.num_steps += 1
            self.say(*frames)
        for request in self._requests.values():
            self._answer_move(request)
        return bool(frames)

    def _answer_move(self, request: _Request) -> None:
        """After the frames of what was drawn, as an engine does."""
        move = request.move
        if move is None or request.holds or not self.hands_over:
            return
        pairs = zip(request.choices, request.num_before, strict=True)
        if not all(choice.ended or choice.num_out > before for choice, before in pairs):
            return
        num_bytes = 1000 * sum(choice.num_out for choice in request.choices)
        self._say_moved(request, move, self.move_error, num_bytes)

    def _say_moved(self, request: _Request, move: Move, error: ErrorInfo | None, num_bytes: int = 0) -> None:
        if error is None:
            request.holds = True
        else:
            request.move = None
        self.tell(
            Moved(
                request_id=move.request_id,
                attempt=move.attempt,
                transfer_id=move.transfer_id,
                error=error,
                num_bytes=num_bytes if error is None and move.mode == "push" else 0,
                transfer_ms=2.0 if error is None and move.mode == "push" else 0.0,
                exposed_ms=0.5 if error is None and move.mode == "push" else 0.0,
            )
        )

    def say(self, *frames: Frame) -> None:
        """Send frames as they are, true or not."""
        self._end.send(Frames(frames=frames, snapshot=self.snapshot()))

    def tell(self, message: EngineMessage) -> None:
        """Send anything: pulses, page deltas, stats."""
        self._end.send(message)

    def send_garbage(self) -> None:
        self._end.send_garbage()

    def crash(self) -> None:
        """EOF, without a word."""
        self._end.close()

    async def close(self) -> None:
        self._end.close()
        await self._task

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            step=self.num_steps,
            num_running=len(self._requests),
            num_requests=len(self._requests),
            draining=self.draining,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _of(self, kind: type[FrontMessage]) -> list[FrontMessage]:
        return [m for m in self.received if isinstance(m, kind)]

    async def _run(self) -> None:
        while (message := await self._end.receive()) is not None:
            self.received.append(message)
            self._handle(message)
            async with self._news:
                self._news.notify_all()
            # One step per turn of the loop, so that the front's commits get a word in.
            while self._auto and self._end.num_waiting == 0 and self.step():
                await asyncio.sleep(0)

    def _handle(self, message: FrontMessage) -> None:
        match message:
            case Hello():
                self._end.send(Hello(incarnation="sample"))
            case Start() | Attach():
                self._end.send(Ready(card=self.card, pid=0))
            case AssetRequest(digest=digest):
                self._end.send(Asset(digest=digest, data=self._assets.get(digest)))
            case Submit(spec=spec) if self.refusal is not None:
                self.say(
                    Frame(
                        request_id=spec.request_id,
                        attempt=spec.attempt,
                        finish_reason=FinishReason.ERROR,
                        error=self.refusal,
                        last=True,
                    )
                )
            case Submit(spec=spec):
                choices = [self._choice(spec, c) for c in range(spec.params.n)]
                self._requests[spec.request_id] = _Request(spec, choices)
            case Abort(request_id=request_id):
                if (gone := self._requests.pop(request_id, None)) is not None:
                    attempt = gone.spec.attempt
                    end = Frame(
                        request_id=request_id, attempt=attempt, finish_reason=FinishReason.ABORT, last=True
                    )
                    self.say(end)
            case Committed(counts=counts):
                for request_id, choice, count in counts:
                    if request_id in self._requests:
                        self._requests[request_id].choices[choice].num_committed = count
            case Move(request_id=request_id) as move:
                self._move(move, self._requests.get(request_id))
            case CancelTransfer(transfer_id=transfer_id):
                for request in self._requests.values():
                    # One that holds already stays so until its attempt is ended: the worst it may do.
                    if request.move and request.move.transfer_id == transfer_id and not request.holds:
                        self._say_moved(request, request.move, CANCELLED)
            case Drain():
                self._auto = True

    def _move(self, move: Move, request: _Request | None) -> None:
        if request is None or request.spec.attempt != move.attempt or request.move is not None:
            nobody = _Request(RequestSpec(request_id="", model="", segments=(), params=SamplingParams()))
            self._say_moved(nobody, move, UNKNOWN)
            return
        request.move = move
        request.num_before = tuple(choice.num_out for choice in request.choices)

    def _choice(self, spec: RequestSpec, index: int) -> _Choice:
        """Where an earlier attempt left off: what it emitted is output and is not said again."""
        num_out = len(spec.emitted[index]) if index < len(spec.emitted) else 0
        script = self._script(spec, index)
        return _Choice(script, num_out=num_out, num_committed=num_out, ended=index in spec.ended)

    def _advance(self, request: _Request) -> list[Frame]:
        frames: list[Frame] = []
        if request.holds:
            return frames
        for index, choice in enumerate(request.choices):
            credit = choice.num_committed + CREDIT_WINDOW - choice.num_out
            if not choice.ended and credit > 0:
                frames.append(self._speak(request, index, choice, min(credit, self._tokens_per_step)))
        return frames

    def _speak(self, request: _Request, index: int, choice: _Choice, num_tokens: int) -> Frame:
        spec = request.spec
        limit = min(len(choice.script), spec.params.max_tokens or 0)
        tokens: list[int] = []
        reason: FinishReason | None = None
        while len(tokens) < num_tokens and reason is None:
            token = choice.script[choice.num_out + len(tokens)]
            tokens.append(token)
            if token in self.card.eos_token_ids and not spec.params.ignore_eos:
                reason = FinishReason.STOP
            elif choice.num_out + len(tokens) >= limit:
                reason = FinishReason.LENGTH
        offset, choice.num_out = choice.num_out, choice.num_out + len(tokens)
        self._num_out[spec.request_id, index] = choice.num_out
        choice.ended = reason is not None
        last = all(c.ended for c in request.choices)
        if last:
            del self._requests[spec.request_id]
        return Frame(
            request_id=spec.request_id,
            attempt=spec.attempt,
            choice=index,
            offset=offset,
            tokens=tuple(tokens),
            finish_reason=reason,
            last=last,
        )
