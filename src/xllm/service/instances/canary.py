"""One tiny request straight through a new connection, before anybody's request may go there.

An engine that has loaded may still compute nonsense: a flipped bit in its weights or a broken core look
healthy until somebody reads an answer. Engines of one numerics class give equal bits, so the first
one's answer is what every later one is held to.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from xllm.errors import InternalError, UnavailableError
from xllm.ids import new_request_id
from xllm.types import ModelCard, RequestSpec, SamplingParams, TokenLogprobs, TokenSegment
from xllm.wire.codec import WireError
from xllm.wire.messages import EngineMessage, Frames, FrontMessage, Submit
from xllm.wire.stream import EngineStream

log = logging.getLogger(__name__)

_NUM_TOKENS = 8
"""Of the prompt: as cheap as one decode step, since weights are read once for all of them."""

Answer = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]
"""The token and its log-probability, whose bits tell more than which token is the likeliest."""


class Canaries:
    """What the first engine of each numerics class answered."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}

    def check(self, card: ModelCard, answer: Answer) -> None:
        """Raises InternalError for an answer other than the first one of this class."""
        if not card.deterministic:
            return
        first = self._answers.setdefault(card.numerics_class, answer)
        if answer != first:
            raise InternalError(
                f"the engine of {card.model_id} gives token {answer[0]} where an equal one gave {first[0]}: "
                "its weights or its memory are corrupt; it gets no requests",
                code="canary_mismatch",
            )


async def ask(stream: EngineStream, card: ModelCard, timeout_s: float) -> tuple[Answer, EngineStream]:
    """The engine's answer, and a stream that goes on as if nothing had been asked.

    Raises the engine's own error, or UnavailableError if it is lost or takes longer than `timeout_s`.
    """
    spec = _spec(card)
    seen: deque[EngineMessage] = deque()
    try:
        async with asyncio.timeout(timeout_s):
            await stream.send(Submit(spec=spec))
            answer = await _answer(stream, spec.request_id, seen)
    except TimeoutError as error:
        message = f"the engine did not answer its first request within {timeout_s:g} s"
        raise UnavailableError(message, code="canary_timeout") from error
    except (ConnectionError, WireError) as error:
        raise UnavailableError("the engine was lost over its first request", code="engine_lost") from error
    return answer, _Rewound(stream, seen)


def _spec(card: ModelCard) -> RequestSpec:
    # Any tokens will do, as long as they are always the same ones and the context holds them.
    length = max(1, min(_NUM_TOKENS, card.max_model_len - 1))
    prompt = tuple((7919 * i + 11) % card.vocab_size for i in range(length))
    params = SamplingParams(
        temperature=0.0,
        seed=0,
        max_tokens=1,
        logprobs=1,
        ignore_eos=True,
        skip_reading_prefix_cache=True,
        detokenize=False,
    )
    return RequestSpec(
        request_id=f"canary-{new_request_id()}",
        model=card.model_id,
        segments=(TokenSegment(prompt),),
        params=params,
    )


async def _answer(stream: EngineStream, request_id: str, seen: deque[EngineMessage]) -> Answer:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    while (message := await stream.receive()) is not None:
        frames = message.frames if isinstance(message, Frames) else ()
        own = [f for f in frames if f.request_id == request_id]
        if not own:
            # Page deltas and the like are for whoever reads the connection afterwards.
            seen.append(message)
        for frame in own:
            if frame.error is not None:
                raise frame.error.to_error()
            tokens += frame.tokens
            logprobs += frame.logprobs
            if frame.last:
                return tokens, logprobs
    raise UnavailableError("the engine ended over its first request", code="engine_lost")


class _Rewound:
    """A stream whose first messages were read already and come again."""

    def __init__(self, stream: EngineStream, seen: deque[EngineMessage]) -> None:
        self._stream = stream
        self._seen = seen

    async def send(self, message: FrontMessage) -> None:
        await self._stream.send(message)

    async def receive(self) -> EngineMessage | None:
        return self._seen.popleft() if self._seen else await self._stream.receive()

    async def close(self) -> None:
        await self._stream.close()
