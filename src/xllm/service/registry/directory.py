"""Who is there, as a front sees it: a listing, kept current by a watch, read anew every few seconds.

The view is advice on where to connect, never the truth on who lives: connections are. So it keeps what
it last knew while the registry is away, and does not believe at once that everybody has left.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from xllm.errors import UnavailableError
from xllm.service.registry.address import Address
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.base import Entry, Event, Listing, Registry, WatchLost
from xllm.service.registry.record import MemberKind, MemberRecord, decode_record, member_prefix

log = logging.getLogger(__name__)

EMPTY_CONFIRMATIONS = 3
"""Listings in a row that must be empty before a front believes that all members left at once."""

MAX_MEMBERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """`epoch` is the registry's revision of the record: of two records of one name the greater is newer."""

    record: MemberRecord
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    joined: tuple[Member, ...] = ()
    left: tuple[Member, ...] = ()
    changed: tuple[Member, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.joined or self.left or self.changed)


OnChange = Callable[[Change], None]


class Directory(Protocol):
    """A source of members. `on_change` is called on the loop, in order, and must return at once."""

    @property
    def members(self) -> dict[str, Member]:
        """By member id; not to be changed."""

    def start(self, on_change: OnChange) -> None:
        """Begin to look."""

    async def close(self) -> None:
        """Stop looking."""


class MemberView:
    """The pure half: entries and events in, changes out. Ignores and counts what is no record."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.num_ignored: Counter[str] = Counter()
        self.num_empty_doubted = 0
        self._cluster = ""
        self._num_empty = 0
        self._complained: set[tuple[str, int]] = set()

    def apply_listing(self, listing: Listing) -> Change:
        """Replace the view by the listing, unless it is suspiciously empty."""
        if not listing.entries and self.members:
            self._num_empty += 1
            if self._num_empty < EMPTY_CONFIRMATIONS:
                self.num_empty_doubted += 1
                return Change()
        self._num_empty = 0
        if listing.cluster != self._cluster:
            # Another store: its revisions cannot be compared with the ones we hold.
            self._cluster = listing.cluster
            self.members = {name: Member(record=m.record, epoch=0) for name, m in self.members.items()}
        found: dict[str, Member] = {}
        for entry in listing.entries:
            member = self._read(entry)
            if member is not None and len(found) < MAX_MEMBERS:
                found[member.record.member_id] = member
        return self._replace(found)

    def apply_event(self, event: Event) -> Change:
        """One change. An event older than what is known of its key says nothing any more."""
        name = event.key.rpartition("/")[2]
        known = self.members.get(name)
        if known is not None and event.revision < known.epoch:
            self.num_ignored["stale_event"] += 1
            return Change()
        after = dict(self.members)
        if event.entry is None:
            after.pop(name, None)
        else:
            member = self._read(event.entry)
            if member is None:
                # What stood there before was overwritten with nonsense: the owner will put it right.
                return Change()
            if known is not None or len(after) < MAX_MEMBERS:
                after[name] = member
        return self._replace(after)

    def _replace(self, after: dict[str, Member]) -> Change:
        before, self.members = self.members, after
        return Change(
            joined=tuple(m for name, m in after.items() if name not in before),
            left=tuple(m for name, m in before.items() if name not in after),
            changed=tuple(
                m for name, m in after.items() if name in before and m.record != before[name].record
            ),
        )

    def _read(self, entry: Entry) -> Member | None:
        record = decode_record(entry.key, entry.value)
        if isinstance(record, MemberRecord):
            return Member(record=record, epoch=entry.mod_revision)
        self.num_ignored[record] += 1
        if len(self._complained) < MAX_MEMBERS and (entry.key, entry.mod_revision) not in self._complained:
            self._complained.add((entry.key, entry.mod_revision))
            log.warning("the registry's entry %r is ignored: %s", entry.key[:200], record)
        # A known member whose record became nonsense is still there as far as we know.
        known = self.members.get(entry.key.rpartition("/")[2])
        return None if known is None else Member(record=known.record, epoch=entry.mod_revision)


class RegistryDirectory:
    """Lists, watches until `relist_s` are over or the watch is lost, lists again.

    A full reading each `relist_s` heals whatever a watch lost, repeated, delayed or turned round.
    """

    def __init__(self, registry: Registry, cluster: str, kind: MemberKind, *, relist_s: float) -> None:
        self.view = MemberView()
        self.num_relists = 0
        self.num_watches_lost: Counter[str] = Counter()
        self._registry = registry
        self._prefix = member_prefix(cluster, kind)
        self._relist_s = relist_s
        self._backoff = Backoff(0.1, min(relist_s, 5.0))
        self._task: asyncio.Task[None] | None = None
        self._reachable = True
        self._listed = asyncio.Event()

    @property
    def members(self) -> dict[str, Member]:
        return self.view.members

    @property
    def reachable(self) -> bool:
        """Whether the registry answered the last time it was asked."""
        return self._reachable

    def start(self, on_change: OnChange) -> None:
        self._task = asyncio.create_task(self._run(on_change), name=f"directory {self._prefix}")

    async def listed(self) -> None:
        """Wait for the first complete listing."""
        await self._listed.wait()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, on_change: OnChange) -> None:
        while True:
            try:
                await self._look(on_change)
                self._backoff.reset()
                continue
            except WatchLost as lost:
                self.num_watches_lost[lost.reason] += 1
            except UnavailableError as error:
                self._say_reachable(False, error.message)
            except Exception:
                # A bug of ours: without this task the front would never hear of anybody again.
                log.exception("reading the members failed; reading them anew")
            await asyncio.sleep(self._backoff.delay_s())

    async def _look(self, on_change: OnChange) -> None:
        """List once and follow until it is time to list again. Raises what the registry raises."""
        listing = await self._registry.list(self._prefix)
        self._say_reachable(True)
        self.num_relists += 1
        _tell(on_change, self.view.apply_listing(listing))
        self._listed.set()
        try:
            async with asyncio.timeout(self._relist_s):
                await self._follow(listing.revision + 1, on_change)
        except TimeoutError:
            return

    async def _follow(self, revision: int, on_change: OnChange) -> None:
        """Apply events. Raises WatchLost, also when one is out of order: only a full reading heals that."""
        async with aclosing(self._registry.watch(self._prefix, revision)) as events:
            async for event in events:
                if event.revision < revision:
                    raise WatchLost("disorder")
                revision = event.revision
                _tell(on_change, self.view.apply_event(event))

    def _say_reachable(self, reachable: bool, why: str = "") -> None:
        if reachable and not self._reachable:
            log.warning("the registry answers again; reading all members anew")
        elif not reachable and self._reachable:
            log.warning("%s; going on with the %d members known", why, len(self.members))
        self._reachable = reachable


class StaticDirectory:
    """Fixed addresses instead of a registry: always there, nothing known of who answers there."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._members = {
            str(a): Member(record=MemberRecord(member_id=str(a), incarnation="", address=str(a)), epoch=0)
            for a in addresses
        }

    @property
    def members(self) -> dict[str, Member]:
        return self._members

    def start(self, on_change: OnChange) -> None:
        on_change(Change(joined=tuple(self._members.values())))

    async def close(self) -> None:
        """Nothing runs."""


def _tell(on_change: OnChange, change: Change) -> None:
    if change:
        on_change(change)
