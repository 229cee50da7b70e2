"""A registry inside this process: for one machine, and the model that the other ones are compared with.

Time comes from a Clock. A lease that has run out is noticed by the next call, by `tick`, or by a
timer of the running loop. No call awaits anything, so each is one step for all who share the object.
"""

from __future__ import annotations

import asyncio
import secrets
from bisect import bisect_left
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from xllm.clock import Clock
from xllm.service.registry.base import (
    Compare,
    Delete,
    Entry,
    Event,
    Get,
    Lease,
    LeaseGone,
    Listing,
    Operation,
    Outcome,
    Put,
    RegistryError,
    WatchLost,
    check_key,
    check_prefix,
    check_transaction,
    check_ttl,
    check_value,
)

MAX_HISTORY = 10_000
"""Events kept for watches that begin in the past; older ones are compacted away."""


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends_s: float
    keys: set[str] = field(default_factory=set)


class EmbeddedRegistry:
    """See `Registry`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._cluster = secrets.token_hex(8)
        self._revision = 1
        self._compacted = 0
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._history: list[Event] = []
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        self._begin()
        return self._entries.get(key)

    async def list(self, prefix: str) -> Listing:
        check_prefix(prefix)
        self._begin()
        found = sorted(key for key in self._entries if key.startswith(prefix))
        entries = tuple(self._entries[key] for key in found)
        return Listing(entries=entries, revision=self._revision, cluster=self._cluster)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        outcome = await self.transact((), (Put(key=key, value=value, lease=lease),))
        return outcome.revision

    async def delete(self, key: str) -> bool:
        outcome = await self.transact((), (Get(key=key), Delete(key=key)))
        return outcome.entries[0] is not None

    async def transact(
        self, compares: Sequence[Compare], successes: Sequence[Operation], failures: Sequence[Operation] = ()
    ) -> Outcome:
        check_transaction(compares, successes, failures)
        self._begin()
        succeeded = all(self._holds(compare) for compare in compares)
        branch = successes if succeeded else failures
        if any(isinstance(op, Put) and op.lease and op.lease not in self._leases for op in branch):
            raise LeaseGone("the lease of this write is gone")
        answers, events = [], []
        revision = self._revision + 1
        for op in branch:
            if isinstance(op, Get):
                answers.append(self._entries.get(op.key))
            elif isinstance(op, Put):
                events.append(self._store(op, revision))
            elif op.key in self._entries:
                events.append(self._drop(op.key, revision))
        self._record(events)
        return Outcome(succeeded=succeeded, revision=self._revision, entries=tuple(answers))

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Event, None]:
        check_prefix(prefix)
        position = from_revision
        while True:
            if self._closed:
                raise WatchLost("closed")
            self._expire()
            if position <= self._compacted:
                raise WatchLost("compacted")
            changed = self._changed
            start = bisect_left(self._history, position, key=lambda event: event.revision)
            position = max(position, self._revision + 1)
            for event in self._history[start:]:
                if event.key.startswith(prefix):
                    yield event
            await changed.wait()

    async def grant(self, ttl_s: float) -> Lease:
        check_ttl(ttl_s)
        self._begin()
        lease_id = secrets.randbits(62) + 1
        self._leases[lease_id] = _Lease(ttl_s=ttl_s, ends_s=self._clock.monotonic_s() + ttl_s)
        self._arm()
        return Lease(lease_id=lease_id, ttl_s=ttl_s)

    async def keep_alive(self, lease_id: int) -> bool:
        self._begin()
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        lease.ends_s = self._clock.monotonic_s() + lease.ttl_s
        return True

    async def revoke(self, lease_id: int) -> None:
        self._begin()
        self._end_lease(lease_id)

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()

    def tick(self) -> None:
        """End what has run out by the clock, for a clock that the loop's timers do not follow."""
        self._expire()

    def compact(self, revision: int) -> None:
        """Forget events up to `revision`; watches that still needed them are lost."""
        self._compacted = max(self._compacted, min(revision, self._revision))
        keep = bisect_left(self._history, self._compacted + 1, key=lambda event: event.revision)
        del self._history[:keep]
        self._wake()

    def _begin(self) -> None:
        if self._closed:
            raise RegistryError("the registry is closed")
        self._expire()

    def _holds(self, compare: Compare) -> bool:
        entry = self._entries.get(compare.key)
        if entry is None:
            return compare.revision == 0
        return compare.revision == (entry.create_revision if compare.on == "create" else entry.mod_revision)

    def _store(self, op: Put, revision: int) -> Event:
        check_value(op.value)
        old = self._entries.get(op.key)
        self._unbind(op.key)
        if op.lease:
            self._leases[op.lease].keys.add(op.key)
        created = revision if old is None else old.create_revision
        entry = Entry(
            key=op.key, value=op.value, create_revision=created, mod_revision=revision, lease=op.lease
        )
        self._entries[op.key] = entry
        return Event(key=op.key, revision=revision, entry=entry)

    def _drop(self, key: str, revision: int) -> Event:
        self._unbind(key)
        del self._entries[key]
        return Event(key=key, revision=revision, entry=None)

    def _unbind(self, key: str) -> None:
        old = self._entries.get(key)
        if old is not None and old.lease in self._leases:
            self._leases[old.lease].keys.discard(key)

    def _record(self, events: Sequence[Event]) -> None:
        if not events:
            return
        self._revision += 1
        self._history.extend(events)
        if len(self._history) > MAX_HISTORY:
            self.compact(self._history[MAX_HISTORY // 2].revision)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _expire(self) -> None:
        now_s = self._clock.monotonic_s()
        for lease_id in [i for i, lease in self._leases.items() if lease.ends_s <= now_s]:
            self._end_lease(lease_id)

    def _end_lease(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            revision = self._revision + 1
            self._record([self._drop(key, revision) for key in sorted(lease.keys)])

    def _arm(self) -> None:
        """One timer for the earliest end; it arms the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._leases and not self._closed:
            next_s = min(lease.ends_s for lease in self._leases.values())
            delay_s = max(0.05, next_s - self._clock.monotonic_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._expire()
        self._arm()
