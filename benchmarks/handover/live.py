"""A running request is moved to and fro between two engines, alone or beside a stream of each that stays.

Its longest gap around a move, in usual steps, beside two others: the neighbours' longest in the same time,
and its own in a time without a move. The three together tell what the move costs from what the machine does.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.handover.bench import FIRST, SECOND, Bench, median
from xllm.errors import XllmError
from xllm.service.handover.record import HandoverRecord
from xllm.service.live import LiveRequest

BETWEEN_LEN = 32
"""Tokens between the end of one move and the order of the next; the second half are the quiet time."""
NEIGHBOUR_PROMPT_LEN = 64
NEIGHBOUR_TOKENS = 4000
_AFTER_LEN = 4
"""Tokens after the switch that still belong to the move: the first steps of the target are cold."""


@dataclass(slots=True)
class Stream:
    """One request and when its tokens came."""

    live: LiveRequest
    token_s: list[float] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    ended: bool = False

    async def read(self) -> None:
        try:
            async for delta in self.live:
                self.token_s += [time.perf_counter()] * len(delta.token_ids)
                self.news.set()
        finally:
            self.ended = True
            self.news.set()

    async def wait_for(self, num_tokens: int) -> None:
        while len(self.token_s) < num_tokens:
            if self.ended:
                raise SystemExit(f"a stream ended after {len(self.token_s)} tokens, too early")
            self.news.clear()
            await self.news.wait()

    def gaps_ms(self, from_s: float, to_s: float) -> list[float]:
        """All that lie at least partly in that time."""
        first = max(0, bisect.bisect_right(self.token_s, from_s) - 1)
        last = bisect.bisect_left(self.token_s, to_s)
        times = self.token_s[first : last + 1]
        return [(b - a) * 1000 for a, b in zip(times, times[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time: the longest gaps in it, the stream's own and the neighbours', in usual steps."""

    own: float
    neighbours: float


@contextlib.asynccontextmanager
async def streaming(bench: Bench, instance: str, prompt_len: int, num_tokens: int) -> AsyncIterator[Stream]:
    """A request there, from its first token until the end of the block."""
    bench.route.instance = instance
    stream = Stream(await bench.submit(prompt_len, num_tokens))
    bench.route.instance = FIRST
    reader = asyncio.create_task(stream.read())
    try:
        await stream.wait_for(1)
        yield stream
    finally:
        await stream.live.aclose()
        with contextlib.suppress(XllmError):
            await reader


async def one_move(bench: Bench, stream: Stream, target: str) -> tuple[float, float, HandoverRecord]:
    """(ordered, done) as times, and what was told of it."""
    bench.seen.records.clear()
    bench.seen.at_s.clear()
    ordered_s = time.perf_counter()
    if why := bench.front.move(stream.live.request_id, target):
        raise SystemExit(f"the request could not be moved: {why}")
    while not bench.seen.records:
        await stream.wait_for(len(stream.token_s) + 1)
    record = bench.seen.records[0]
    if record.outcome != "done":
        raise SystemExit(f"a hand-over did not come about: {record}")
    return ordered_s, bench.seen.at_s[0], record


async def measure_live(bench: Bench, rounds: int, context_len: int, beside: bool) -> dict[str, Any]:
    moves: list[Span] = []
    quiet: list[Span] = []
    records: list[HandoverRecord] = []
    switches: list[float] = []
    copying: list[float] = []
    step_ms = 0.0
    async with contextlib.AsyncExitStack() as stack:
        num_tokens = (rounds + 2) * 4 * BETWEEN_LEN
        stream = await stack.enter_async_context(streaming(bench, FIRST, context_len, num_tokens))
        others = [
            await stack.enter_async_context(streaming(bench, name, NEIGHBOUR_PROMPT_LEN, NEIGHBOUR_TOKENS))
            for name in (FIRST, SECOND)
            if beside
        ]
        for number in range(rounds + 1):
            await stream.wait_for(len(stream.token_s) + BETWEEN_LEN)
            still_s = stream.token_s[-BETWEEN_LEN // 2], stream.token_s[-1]
            ordered_s, done_s, record = await one_move(bench, stream, FIRST if number % 2 else SECOND)
            at = bisect.bisect_right(stream.token_s, done_s)
            await stream.wait_for(at + _AFTER_LEN)
            if not number:
                continue  # it connects, maps and captures
            step_ms = statistics.median(stream.gaps_ms(*still_s))
            moves.append(_span(stream, others, ordered_s, stream.token_s[at + _AFTER_LEN - 1], still_s))
            quiet.append(_span(stream, others, *still_s, still_s))
            switches.append((stream.token_s[at] - stream.token_s[at - 1]) * 1000 / step_ms)
            copying.append(_mean(stream.gaps_ms(ordered_s, stream.token_s[at - 1])) / step_ms)
            records.append(record)
    return {
        "context_len": context_len,
        "mib": round(records[0].num_bytes / 2**20, 1),
        "transfer_ms": median(r.transfer_ms for r in records),
        "exposed_ms": median(r.exposed_ms for r in records),
        "tokens_while_moving": median(r.wait_s * 1000 / step_ms for r in records),
        "step_ms": round(step_ms, 3),
        "longest_gap_steps": median(m.own for m in moves),
        "longest_gap_steps_each": [round(m.own, 2) for m in moves],
        "switch_gap_steps": median(switches),
        "switch_gap_steps_each": [round(s, 2) for s in switches],
        "mean_gap_steps_while_copying": median(copying),
        "longest_gap_steps_of_neighbours": median(m.neighbours for m in moves),
        "longest_gap_steps_of_neighbours_each": [round(m.neighbours, 2) for m in moves],
        "longest_gap_steps_without_a_move": median(q.own for q in quiet),
        "longest_gap_steps_of_neighbours_without": median(q.neighbours for q in quiet),
    }


def _span(
    stream: Stream, others: list[Stream], from_s: float, to_s: float, still_s: tuple[float, float]
) -> Span:
    """Each stream's gaps in steps of its own, as they are without a move."""
    longest = [
        max(s.gaps_ms(from_s, to_s)) / statistics.median(s.gaps_ms(*still_s)) for s in (stream, *others)
    ]
    return Span(own=longest[0], neighbours=max(longest[1:], default=0.0))


def _mean(gaps_ms: list[float]) -> float:
    return statistics.fmean(gaps_ms) if gaps_ms else 0.0
