"""A front on a fake clock with sample engines, closed after the test without leftover tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from xllm.config import FrontConfig
from xllm.errors import XllmError
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.live import LiveRequest
from xllm.service.stream import Delta
from xllm.testing.clock import FakeClock
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.types import SamplingParams

ASSETS = tiny_assets(512)


def byte_ids(text: str) -> tuple[int, ...]:
    """One token per UTF-8 byte, so that a test knows which token completes what."""
    return tuple(3 + b for b in text.encode())


def say(text: str) -> Callable[[Any, int], tuple[int, ...]]:
    """A script: every choice says `text` byte by byte, then EOS."""
    return lambda spec, choice: (*byte_ids(text), 2)


@dataclass
class House:
    """Front, clock and engines of one test."""

    clock: FakeClock
    front: Front
    engines: list[SampleEngine] = field(default_factory=list)

    async def engine(
        self,
        *,
        model: str = "sample",
        max_reqs: int | None = None,
        name: str | None = None,
        numerics: str = "sample",
        join: dict[str, Any] | None = None,
        **how: Any,
    ) -> SampleEngine:
        """`join` goes to `add_instance`, `how` to the engine."""
        card = msgspec.structs.replace(sample_card(ASSETS, model_id=model), numerics_class=numerics)
        engine = SampleEngine(card, ASSETS, **how)
        name = name or f"engine-{len(self.engines)}"
        self.engines.append(engine)
        await self.front.add_instance(engine.stream, card, name=name, max_reqs=max_reqs, **(join or {}))
        return engine

    def pass_time(self, seconds: float) -> None:
        """As if the front had ticked all the while."""
        for _ in range(round(seconds / 0.2)):
            self.clock.advance(0.2)
            self.front.check_times()

    async def submit(
        self, prompt: str = "hello", *, model: str = "sample", deadline_ms: float | None = None, **params: Any
    ) -> LiveRequest:
        draft = RequestDraft(
            model=model,
            prompt_token_ids=byte_ids(prompt),
            params=SamplingParams(**{"max_tokens": 64, **params}),
            deadline_ms=deadline_ms,
        )
        return await self.front.submit(draft)

    def reconfigure(self, **config: Any) -> None:
        self.front = Front(FrontConfig(**{**BY_TURNS, **config}), None, self.clock)


BY_TURNS = {"router_policy": "round-robin"}
"""Tests of the front name the engine that they expect; how loads and caches place has tests of its own."""


@pytest.fixture
async def house() -> AsyncIterator[House]:
    clock = FakeClock()
    made = House(clock=clock, front=Front(FrontConfig(**BY_TURNS), None, clock))
    yield made
    await made.front.close()
    for engine in made.engines:
        await engine.close()
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, left
    assert made.front.snapshot().num_inflight_reqs == 0
    assert made.front.snapshot().num_inflight_tokens == 0


async def collect(stream: LiveRequest) -> list[Delta]:
    return [delta async for delta in stream]


async def outcome(stream: LiveRequest) -> tuple[list[Delta], XllmError | None]:
    """All deltas and the error they ended with."""
    deltas: list[Delta] = []
    try:
        async for delta in stream:
            deltas.append(delta)
    except XllmError as error:
        return deltas, error
    return deltas, None


def text_of(deltas: list[Delta], choice: int = 0) -> str:
    return "".join(d.text for d in deltas if d.choice == choice)


def tokens_of(deltas: list[Delta], choice: int = 0) -> tuple[int, ...]:
    return tuple(t for d in deltas if d.choice == choice for t in d.token_ids)


def finishes(deltas: list[Delta]) -> dict[int, tuple[str | None, str | int | None]]:
    ends = [(d.choice, (d.finish_reason, d.stop_reason)) for d in deltas if d.finish_reason is not None]
    assert len(ends) == len(dict(ends)), "a choice finished twice"
    return dict(ends)


async def turns(done: Callable[[], bool], limit: int = 10_000) -> None:
    """Let the loop turn until `done`; a bound on turns, not on time."""
    for _ in range(limit):
        if done():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")
