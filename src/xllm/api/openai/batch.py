"""The requests behind one HTTP request (one per prompt), read as a single sequence of deltas.

Submits all or none; closing aborts whatever still runs. No formatting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from xllm.service.draft import RequestDraft
from xllm.service.stream import Delta, RequestStream, Usage


class Submitter(Protocol):
    async def submit(self, draft: RequestDraft) -> RequestStream: ...


class Batch:
    """`streams[p]` belongs to prompt p; output choice = p × n + the choice of its request."""

    def __init__(self, streams: Sequence[RequestStream], n: int) -> None:
        self.streams = tuple(streams)
        self.n = n
        self._pumps: list[asyncio.Task[None]] = []

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(s.request_id for s in self.streams)

    @property
    def num_choices(self) -> int:
        return len(self.streams) * self.n

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(output choice, delta) in order of arrival. Raises the first error of any request."""
        if len(self.streams) == 1:
            async for delta in self.streams[0]:
                yield delta.choice, delta
            return
        # One slot: a reader that lags holds every stream back, as a single stream would be.
        queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(1)
        self._pumps = [asyncio.create_task(self._pump(i, s, queue)) for i, s in enumerate(self.streams)]
        left = len(self._pumps)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    async def _pump(
        self, prompt: int, stream: RequestStream, queue: asyncio.Queue[tuple[int, Delta] | Exception | None]
    ) -> None:
        try:
            async for delta in stream:
                await queue.put((prompt * self.n + delta.choice, delta))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001  handed to the reader, who raises it
            await queue.put(error)

    def usage(self) -> Usage:
        parts = [s.usage() for s in self.streams]
        return Usage(
            prompt_tokens=sum(u.prompt_tokens for u in parts),
            completion_tokens=sum(u.completion_tokens for u in parts),
            cached_tokens=sum(u.cached_tokens for u in parts),
        )

    async def aclose(self) -> None:
        """Abort what has not ended; idempotent."""
        for pump in self._pumps:
            pump.cancel()
        for stream in self.streams:
            await stream.aclose()


async def submit_all(front: Submitter, drafts: Sequence[RequestDraft]) -> Batch:
    """Submit every draft or, when one is refused, none. Raises what `submit` raises."""
    streams: list[RequestStream] = []
    try:
        for draft in drafts:
            streams.append(await front.submit(draft))
    except BaseException:
        for stream in streams:
            await stream.aclose()
        raise
    return Batch(streams, drafts[0].params.n)


def usage_json(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def last_chunk(
    batch: Batch, *, include_usage: bool, explain: Callable[[], dict[str, Any]] | None
) -> dict[str, Any]:
    """What a stream tells after its last choice has ended; empty when nothing was asked for."""
    last: dict[str, Any] = {"usage": usage_json(batch.usage())} if include_usage else {}
    if explain is not None:
        last["xllm"] = explain()
    return last
