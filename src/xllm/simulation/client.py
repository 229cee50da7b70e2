"""A simulated client: submits one request, reads in its own way, and keeps what it got.

What it got is a value for the oracle; nothing is judged here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm.errors import XllmError
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.live import LiveRequest
from xllm.service.stream import Delta, Usage
from xllm.simulation.schedule import SimRequest
from xllm.types import RequestSpec

STALL_S = 45.0
"""Longer than a front lets a full buffer stand (FrontConfig.slow_reader_timeout_s)."""


@dataclass(slots=True)
class Outcome:
    """`refused` = not accepted; `error` = how it ended badly; `left` = by the client's own will."""

    index: int
    request: SimRequest
    spec: RequestSpec | None = None
    deltas: list[Delta] = field(default_factory=list)
    submitted_s: float = 0.0
    ended_s: float | None = None
    first_s: float | None = None
    longest_gap_s: float = 0.0
    refused: XllmError | None = None
    error: XllmError | None = None
    left: bool = False
    usage: Usage | None = None


def ignore_delta(outcome: Outcome) -> None:
    """For readers whom nobody watches."""


class Client:
    """`outcome.ended_s` stays None when the request never ended."""

    def __init__(
        self,
        index: int,
        request: SimRequest,
        front: Front,
        origin_s: float,
        on_delta: Callable[[Outcome], None] = ignore_delta,
    ) -> None:
        self.outcome = Outcome(index=index, request=request)
        self._request = request
        self._front = front
        self._on_delta = on_delta
        self._origin_s = origin_s
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        request, outcome = self._request, self.outcome
        await asyncio.sleep(self._origin_s + request.at_s - self._loop.time())
        outcome.submitted_s = self._loop.time()
        try:
            stream = await self._front.submit(_draft(request))
        except XllmError as error:
            outcome.refused = error
            outcome.ended_s = self._loop.time()
            return
        outcome.spec = stream.journal.spec
        try:
            await self._read(stream)
        except XllmError as error:
            outcome.error = error
        outcome.ended_s = self._loop.time()
        outcome.usage = stream.usage()

    async def _read(self, stream: LiveRequest) -> None:
        request, outcome = self._request, self.outcome
        last_s = outcome.submitted_s
        stalled = False
        if request.habit == "leave" and request.after == 0:
            outcome.left = True
            await stream.aclose()
            return
        async for delta in stream:
            now_s = self._loop.time()
            outcome.longest_gap_s = max(outcome.longest_gap_s, now_s - last_s)
            if outcome.first_s is None:
                outcome.first_s = now_s
            outcome.deltas.append(delta)
            self._on_delta(outcome)
            if len(outcome.deltas) > request.after:
                match request.habit:
                    case "leave":
                        outcome.left = True
                        await stream.aclose()
                        return
                    case "abort":
                        outcome.left = await self._front.abort(stream.request_id) or outcome.left
                    case "stall" if not stalled:
                        stalled = True
                        await asyncio.sleep(STALL_S)
                    case _:
                        pass
            if request.habit == "slow":
                await asyncio.sleep(request.pause_s)
            last_s = self._loop.time()


def _draft(request: SimRequest) -> RequestDraft:
    return RequestDraft(
        model="simulated",
        prompt_token_ids=request.prompt,
        params=request.params,
        deadline_ms=request.deadline_ms,
        priority=request.priority,
        cls=request.cls,
        cache_salt=request.cache_salt,
    )
