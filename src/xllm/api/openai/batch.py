"""The requests behind one HTTP request (one per prompt), read as a single sequence of deltas.

All are checked before any output; those that find no room yet are submitted as the others end. Closing
aborts whatever still runs. No formatting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from xllm.errors import CapacityError, DeadlineError
from xllm.service.draft import RequestDraft
from xllm.service.stream import Delta, RequestStream, Usage

ASK_AGAIN_S = 0.5
"""With none of its own running, a batch cannot know when there is room; it asks."""

_Item = tuple[int, Delta] | Exception | None


class Submitter(Protocol):
    async def submit(self, draft: RequestDraft) -> RequestStream: ...

    def check(self, draft: RequestDraft) -> None: ...


class Batch:
    """`streams[p]` belongs to prompt p; output choice = p × n + the choice of its request.

    `rest` are the drafts that found no room, in order; they follow while the deltas are read.
    """

    def __init__(
        self, front: Submitter, streams: Sequence[RequestStream], n: int, rest: Sequence[RequestDraft] = ()
    ) -> None:
        self.streams = list(streams)
        self.n = n
        self._front = front
        self._rest = tuple(rest)
        self.num_choices = (len(self.streams) + len(self._rest)) * n
        # Others shall find room too: with everything that was free in use, all of them would be refused.
        self._window = max(1, len(self.streams) // 2)
        self._since_s = asyncio.get_running_loop().time()
        self._num_running = 0
        self._one_ended = asyncio.Event()
        # One slot: a reader that lags holds every stream back, as a single stream would be.
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(1)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Those that were submitted by now."""
        return tuple(s.request_id for s in self.streams)

    @property
    def only(self) -> RequestStream | None:
        """The stream, if there is but one."""
        return self.streams[0] if len(self.streams) == 1 and not self._rest else None

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(output choice, delta) in order of arrival; read once. Raises the first error of any request."""
        if (only := self.only) is not None:
            async for delta in only:
                yield delta.choice, delta
            return
        left = self.num_choices // self.n
        for prompt, stream in enumerate(self.streams):
            self._start(self._pump(prompt, stream))
            self._num_running += 1
        if self._rest:
            self._start(self._feed())
        while left:
            item = await self._queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    def usage(self) -> Usage:
        parts = [s.usage() for s in self.streams]
        return Usage(
            prompt_tokens=sum(u.prompt_tokens for u in parts),
            completion_tokens=sum(u.completion_tokens for u in parts),
            cached_tokens=sum(u.cached_tokens for u in parts),
        )

    async def aclose(self) -> None:
        """Abort what has not ended; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in self.streams:
            await stream.aclose()

    # -- tasks ------------------------------------------------------------------------------------

    def _start(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _pump(self, prompt: int, stream: RequestStream) -> None:
        try:
            async for delta in stream:
                await self._queue.put((prompt * self.n + delta.choice, delta))
            await self._queue.put(None)
        except Exception as error:  # noqa: BLE001  handed to the reader, who raises it
            await self._queue.put(error)
        finally:
            self._num_running -= 1
            self._one_ended.set()

    async def _feed(self) -> None:
        try:
            for draft in self._rest:
                stream = await self._submitted(draft)
                self.streams.append(stream)
                self._num_running += 1
                self._start(self._pump(len(self.streams) - 1, stream))
        except Exception as error:  # noqa: BLE001  handed to the reader, who raises it
            await self._queue.put(error)

    async def _submitted(self, draft: RequestDraft) -> RequestStream:
        """Submit once there is room; raises what `submit` raises otherwise."""
        while True:
            while self._num_running >= self._window:
                await self._room()
            try:
                return await self._front.submit(self._timed(draft))
            except CapacityError:
                await self._room()

    async def _room(self) -> None:
        self._one_ended.clear()
        # Not wait_for: it may lose the cancellation that comes together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_AGAIN_S):
                await self._one_ended.wait()

    def _timed(self, draft: RequestDraft) -> RequestDraft:
        """The client's time limit is one for the whole, and it has been running."""
        if draft.deadline_ms is None:
            return draft
        left_ms = draft.deadline_ms - (asyncio.get_running_loop().time() - self._since_s) * 1000
        if left_ms <= 0:
            raise DeadlineError("the request's deadline passed")
        return replace(draft, deadline_ms=left_ms)


async def submit_all(front: Submitter, drafts: Sequence[RequestDraft]) -> Batch:
    """Submit the drafts: all that find room now, the others later.

    Raises what `submit` raises; nothing runs then. With no room for the first one the whole is refused.
    """
    streams: list[RequestStream] = []
    try:
        for index, draft in enumerate(drafts):
            try:
                streams.append(await front.submit(draft))
            except CapacityError:
                if not streams:
                    raise
                # What is wrong with a later one must be told before the first output of the others.
                for late in drafts[index:]:
                    front.check(late)
                return Batch(front, streams, drafts[0].params.n, drafts[index:])
    except BaseException:
        for stream in streams:
            await stream.aclose()
        raise
    return Batch(front, streams, drafts[0].params.n)


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
