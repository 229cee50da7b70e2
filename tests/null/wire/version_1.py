"""Version 1 of the wire as it was released, frozen: its messages, a front and an engine that know no other.

Never to be changed along with `xllm.wire.messages`. What came later must not reach these decoders: they
refuse tags they do not know.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import msgspec

from xllm.config import EngineConfig
from xllm.errors import ErrorInfo
from xllm.types import SLO, FinishReason, ModelCard, SamplingParams, Segment, TokenLogprobs

VERSION = 1


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    version: int = VERSION
    incarnation: str = ""


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    config: EngineConfig


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    stage: str
    elapsed_s: float = 0.0
    assets: dict[str, bytes] = {}


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    card: ModelCard
    pid: int
    report: tuple[str, ...] = ()


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag="start_failed"):
    error: ErrorInfo


class AssetRequest(msgspec.Struct, frozen=True, kw_only=True, tag="asset_request"):
    digest: str


class Asset(msgspec.Struct, frozen=True, kw_only=True, tag="asset"):
    digest: str
    data: bytes | None


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    request_id: str
    model: str
    segments: tuple[Segment, ...]
    params: SamplingParams
    adapter: str | None = None
    cls: str = "online"
    priority: int = 0
    slo: SLO = SLO()
    deadline_ms: float | None = None
    tenant: str = ""
    cache_salt: str = ""
    trace: str | None = None
    attempt: int = 0
    emitted: tuple[tuple[int, ...], ...] = ()


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    spec: RequestSpec


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    request_id: str
    attempt: int = 0


class Committed(msgspec.Struct, frozen=True, kw_only=True, tag="committed"):
    counts: tuple[tuple[str, int, int], ...]


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag="frame", omit_defaults=True):
    request_id: str
    attempt: int = 0
    choice: int = 0
    offset: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int = 0
    queue_ms: float = 0.0
    last: bool = False


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0
    total_pages: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    owned_pages: int = 0
    transfer_pages: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_step_ms: float = 0.0
    num_accepted: int = 0
    num_ended: int = 0
    program_captures: int = 0
    program_replays: int = 0
    num_eager_steps: int = 0
    program_arena_bytes: int = 0


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag="frames"):
    frames: tuple[Frame, ...]
    snapshot: Snapshot


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    snapshot: Snapshot


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    pass


FrontMessage = Hello | Start | AssetRequest | Submit | Abort | Committed | Drain
EngineMessage = Hello | Progress | Ready | StartFailed | Asset | Frames | Stats

_encoder = msgspec.msgpack.Encoder()
_front: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
_engine: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def encode(message: FrontMessage | EngineMessage) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


class FrontV1:
    """The front's end of an inherited socket; blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")
        self._sock = sock

    def send(self, *messages: FrontMessage) -> None:
        self._sock.sendall(b"".join(map(encode, messages)))

    def receive(self) -> EngineMessage:
        """Raises msgspec.ValidationError for anything that is not of version 1."""
        length = int.from_bytes(self._file.read(4), "little")
        return _engine.decode(self._file.read(length))

    def until(self, condition: Callable[[EngineMessage], bool]) -> EngineMessage:
        while not condition(message := self.receive()):
            pass
        return message


class EngineV1:
    """The engine's end: says the prompt again, 16 tokens ahead at most, and keeps what it was told."""

    def __init__(self, sock: socket.socket, card: ModelCard, assets: dict[str, bytes]) -> None:
        self._sock, self._card, self._assets = sock, card, assets
        self.received: list[FrontMessage] = []
        self._specs: dict[str, RequestSpec] = {}
        self._num_said: dict[str, int] = {}

    async def serve(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._sock)
        self._send(Hello(incarnation="old"))
        while header := await reader.read(4):
            body = await reader.readexactly(int.from_bytes(header, "little"))
            message = _front.decode(body)
            self.received.append(message)
            self._handle(message)
        self._writer.close()

    def _send(self, message: EngineMessage) -> None:
        self._writer.write(encode(message))

    def _handle(self, message: FrontMessage) -> None:
        match message:
            case Start():
                self._send(Ready(card=self._card, pid=1))
            case AssetRequest(digest=digest):
                self._send(Asset(digest=digest, data=self._assets.get(digest)))
            case Submit(spec=spec):
                self._specs[spec.request_id] = spec
                self._num_said[spec.request_id] = 0
                self._say(spec, 0)
            case Committed(counts=counts):
                for request_id, _, count in counts:
                    if request_id in self._specs:
                        self._say(self._specs[request_id], count)

    def _say(self, spec: RequestSpec, num_committed: int) -> None:
        prompt = [t for s in spec.segments for t in s.token_ids]  # type: ignore[union-attr]
        length = spec.params.max_tokens or 1
        first = self._num_said[spec.request_id]
        end = min(num_committed + 16, length)
        if end <= first:
            return
        self._num_said[spec.request_id] = end
        last = end == length
        frame = Frame(
            request_id=spec.request_id,
            attempt=spec.attempt,
            offset=first,
            tokens=tuple(prompt[i % len(prompt)] for i in range(first, end)),
            finish_reason=FinishReason.LENGTH if last else None,
            last=last,
        )
        if last:
            del self._specs[spec.request_id]
        self._send(Frames(frames=(frame,), snapshot=Snapshot(step=end)))
