"""Sends requests at their planned times and records what comes back (one event loop, open loop).

Times come from the clock passed in and are seconds from the start of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.metrics import Outcome
from xllm.cli.http_client import Exchange, Server, TransportError, events
from xllm.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which endpoint of which server, as which user."""

    server: Server
    model: str
    chat: bool = False
    api_key: str = ""
    extra: dict[str, Any] | None = None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def payload(self, ask: Ask) -> dict[str, Any]:
        """`ignore_eos` keeps output lengths as planned; servers that do not know it ignore it."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.output_len,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        body |= (
            {"messages": [{"role": "user", "content": ask.prompt}]} if self.chat else {"prompt": ask.prompt}
        )
        return body | (self.extra or {})


async def run_load(
    target: Target,
    asks: Sequence[Ask],
    at_s: Sequence[float],
    clock: Clock,
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Send `asks[i]` at `at_s[i]`; with `max_concurrency` later if that many are under way.

    Latencies count from the actual sending, as vLLM's benchmark does; how much later than planned
    that was is in `Outcome.lateness_s` when the client, not the cap, was the reason.
    """
    origin = clock.monotonic_s()
    gate: Any = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def one(ask: Ask, planned_s: float) -> Outcome:
        late = clock.monotonic_s() - origin - planned_s
        async with gate:
            outcome = await send(target, ask, clock, origin)
        outcome.lateness_s = max(0.0, late)
        on_done()
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = []
        for ask, planned_s in zip(asks, at_s, strict=True):
            delay = planned_s - (clock.monotonic_s() - origin)
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(group.create_task(one(ask, planned_s)))
    return [task.result() for task in tasks]


async def send(target: Target, ask: Ask, clock: Clock, origin: float) -> Outcome:
    """One request to its end; a failure of any kind becomes the outcome's `error`."""
    outcome = Outcome(start_s=clock.monotonic_s() - origin)
    try:
        async with Exchange(
            target.server, "POST", target.path, target.payload(ask), target.api_key
        ) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}"
            elif not await _absorb(response.body, outcome, clock, origin):
                outcome.error = "stream ended without [DONE]"
    except TransportError as error:
        outcome.error = str(error)
    except json.JSONDecodeError:
        outcome.error = "an event that is not JSON"
    outcome.end_s = clock.monotonic_s() - origin
    return outcome


async def _absorb(body: Any, outcome: Outcome, clock: Clock, origin: float) -> bool:
    """Read the stream; True when it ended as it should."""
    last_s: float | None = None
    done = False
    texts: list[str] = []
    async for data in events(body):
        if data == b"[DONE]":
            # Read on to the end of the body: closing on unread bytes would reset the connection.
            done = True
            continue
        now_s = clock.monotonic_s() - origin
        event = json.loads(data)
        if "error" in event:
            outcome.error = "error event in the stream"
            return True
        if usage := event.get("usage"):
            outcome.num_input_tokens = usage.get("prompt_tokens", 0)
            outcome.num_output_tokens = usage.get("completion_tokens", 0)
        for choice in event.get("choices", ()):
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if not text:
                # The role chunk, or a token whose bytes are held back: nothing a reader sees.
                continue
            texts.append(text)
            if last_s is None:
                outcome.ttft_s = now_s - outcome.start_s
            else:
                outcome.itls_s.append(now_s - last_s)
            last_s = now_s
    outcome.text = "".join(texts)
    # A server without usage: a chunk is the best guess at a token.
    outcome.num_output_tokens = outcome.num_output_tokens or len(texts)
    return done
