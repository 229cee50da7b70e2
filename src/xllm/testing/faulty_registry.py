"""A registry that goes away and whose watches lie: wraps a real one, for tests of those who rely on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from xllm.service.registry.base import (
    Compare,
    Entry,
    Event,
    Lease,
    Listing,
    Operation,
    Outcome,
    Registry,
    RegistryError,
    WatchLost,
)

Mangle = Callable[[Event], Sequence[Event]]
"""What a watch tells instead of an event: nothing, it twice, an older one, …"""


class FaultyRegistry:
    """Set `down`, `empty`, `mangle` or `lose_answer` at any time. `num_faults` counts what went wrong."""

    def __init__(self, inner: Registry) -> None:
        self.inner = inner
        self.empty = False
        self.lose_answer = False
        self.mangle: Mangle | None = None
        self.num_faults = 0
        self._down = False
        self._went_down = asyncio.Event()

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        self._down = down
        went, self._went_down = self._went_down, asyncio.Event()
        if down:
            went.set()

    async def get(self, key: str) -> Entry | None:
        self._check()
        return await self.inner.get(key)

    async def list(self, prefix: str) -> Listing:
        self._check()
        listing = await self.inner.list(prefix)
        if self.empty:
            self.num_faults += 1
            return Listing(entries=(), revision=listing.revision, cluster=listing.cluster)
        return listing

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        self._check()
        return await self.inner.put(key, value, lease)

    async def delete(self, key: str) -> bool:
        self._check()
        return await self.inner.delete(key)

    async def transact(
        self, compares: Sequence[Compare], successes: Sequence[Operation], failures: Sequence[Operation] = ()
    ) -> Outcome:
        self._check()
        outcome = await self.inner.transact(compares, successes, failures)
        if self.lose_answer:
            self.lose_answer = False
            self.num_faults += 1
            raise RegistryError("the answer was lost")
        return outcome

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Event, None]:
        async with aclosing(self.inner.watch(prefix, from_revision)) as events:
            while True:
                event = await self._next(events)
                told = [event] if self.mangle is None else list(self.mangle(event))
                self.num_faults += told != [event]
                for one in told:
                    yield one

    async def grant(self, ttl_s: float) -> Lease:
        self._check()
        return await self.inner.grant(ttl_s)

    async def keep_alive(self, lease_id: int) -> bool:
        self._check()
        return await self.inner.keep_alive(lease_id)

    async def revoke(self, lease_id: int) -> None:
        self._check()
        await self.inner.revoke(lease_id)

    async def close(self) -> None:
        await self.inner.close()

    def _check(self) -> None:
        if self._down:
            self.num_faults += 1
            raise RegistryError("the registry is down")

    async def _next(self, events: AsyncGenerator[Event, None]) -> Event:
        """The next event, unless the registry goes down before it comes."""
        if self._down:
            raise WatchLost("disconnected")
        down = asyncio.ensure_future(self._went_down.wait())
        coming = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait((down, coming), return_when=asyncio.FIRST_COMPLETED)
            if down.done():
                self.num_faults += 1
                raise WatchLost("disconnected")
            return coming.result()
        finally:
            for task in (down, coming):
                task.cancel()
            await asyncio.gather(down, coming, return_exceptions=True)
