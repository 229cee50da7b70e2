"""What every registry must do: one suite, run against the embedded one here and a real etcd in integration.

A module that takes these tests imports all of them and gives the fixture `store`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from xllm.errors import RequestError
from xllm.service.registry.base import (
    MAX_VALUE_BYTES,
    Compare,
    Delete,
    Event,
    Get,
    LeaseGone,
    Put,
    Registry,
    RegistryError,
    WatchLost,
)


@dataclass
class Store:
    """The registry under test, a second client of the same store, and what only its operator can do."""

    registry: Registry
    other: Registry
    compact: Callable[[int], Awaitable[None]]
    pass_time: Callable[[float], Awaitable[None]]
    min_ttl_s: float


async def take(events: AsyncIterator[Event], count: int) -> list[Event]:
    async with asyncio.timeout(10.0):
        return [await anext(events) for _ in range(count)]


# -- keys -----------------------------------------------------------------------------------------------


async def test_what_was_put_is_read_by_everybody(store: Store) -> None:
    assert await store.registry.get("/c/a") is None
    first = await store.registry.put("/c/a", b"1")
    second = await store.registry.put("/c/a", b"2")
    entry = await store.other.get("/c/a")
    assert entry is not None
    assert (entry.value, entry.create_revision, entry.mod_revision) == (b"2", first, second)
    assert second == first + 1
    assert await store.other.delete("/c/a")
    assert not await store.other.delete("/c/a")
    assert await store.registry.get("/c/a") is None


async def test_a_listing_is_sorted_has_a_revision_and_respects_the_border(store: Store) -> None:
    for key in ("/c/a/10/x", "/c/a/1/y", "/c/a/1/x", "/c/a", "/c/ab/1", "/c/a/1"):
        await store.registry.put(key, key.encode())
    listing = await store.other.list("/c/a/1/")
    assert [e.key for e in listing.entries] == ["/c/a/1/x", "/c/a/1/y"]
    assert [e.key for e in (await store.registry.list("/c/a/")).entries] == [
        "/c/a/1",
        "/c/a/1/x",
        "/c/a/1/y",
        "/c/a/10/x",
    ]
    assert listing.revision >= max(e.mod_revision for e in listing.entries)
    assert listing.cluster == (await store.registry.list("/none/")).cluster != ""


async def test_many_keys_are_listed_completely(store: Store) -> None:
    keys = [f"/c/many/{i:03d}" for i in range(150)]
    for start in range(0, len(keys), 30):
        puts = [Put(key=key, value=b"v") for key in keys[start : start + 30]]
        await store.registry.transact((), puts)
    listing = await store.registry.list("/c/many/")
    assert [e.key for e in listing.entries] == keys
    assert len({e.mod_revision for e in listing.entries}) == 5


@pytest.mark.parametrize(
    "key", ["", "a", "/", "/a/", "//a", "/a b", "/a\x00", "/ä", "/a" * 300, "/" + "k" * 200]
)
async def test_odd_keys_never_reach_the_store(store: Store, key: str) -> None:
    with pytest.raises(RequestError):
        await store.registry.get(key)
    with pytest.raises(RequestError):
        await store.registry.put(key, b"v")
    with pytest.raises(RequestError):
        await store.registry.transact([Compare(key=key, revision=0)], [Put(key="/c/a", value=b"")])
    with pytest.raises(RequestError):
        await store.registry.list(key + "x")


async def test_values_are_bytes_up_to_a_bound(store: Store) -> None:
    whole = bytes(range(256)) * (MAX_VALUE_BYTES // 256)
    await store.registry.put("/c/a", whole)
    await store.registry.put("/c/b", b"")
    read = await store.registry.get("/c/a"), await store.registry.get("/c/b")
    assert [e.value for e in read if e is not None] == [whole, b""]
    with pytest.raises(RequestError):
        await store.registry.put("/c/a", whole + b"x")


# -- transactions -----------------------------------------------------------------------------------------


async def test_create_only_succeeds_once_and_tells_the_loser_who_holds_it(store: Store) -> None:
    async def create(registry: Registry, name: bytes) -> tuple[bool, bytes | None]:
        outcome = await registry.transact(
            [Compare(key="/c/lock", revision=0, on="create")],
            [Put(key="/c/lock", value=name)],
            [Get(key="/c/lock")],
        )
        held = outcome.entries[0].value if outcome.entries and outcome.entries[0] else None
        return outcome.succeeded, held

    assert await create(store.registry, b"one") == (True, None)
    assert await create(store.other, b"two") == (False, b"one")


async def test_an_update_is_fenced_by_the_revision_it_was_read_at(store: Store) -> None:
    revision = await store.registry.put("/c/a", b"1")
    swap = [Compare(key="/c/a", revision=revision)]
    assert (await store.other.transact(swap, [Put(key="/c/a", value=b"2")])).succeeded
    late = await store.registry.transact(swap, [Put(key="/c/a", value=b"late")])
    assert not late.succeeded
    entry = await store.registry.get("/c/a")
    assert entry is not None
    assert entry.value == b"2"


async def test_a_recreated_key_does_not_pass_for_the_old_one(store: Store) -> None:
    created = await store.registry.put("/c/a", b"1")
    await store.registry.delete("/c/a")
    await store.registry.put("/c/a", b"1")
    for on in ("create", "mod"):
        stale = [Compare(key="/c/a", revision=created, on=on)]  # type: ignore[arg-type]
        assert not (await store.registry.transact(stale, [Delete(key="/c/a")])).succeeded
    assert await store.registry.get("/c/a") is not None


async def test_all_of_a_transaction_happens_at_one_revision_or_nothing(store: Store) -> None:
    await store.registry.put("/c/b", b"old")
    watch = store.registry.watch("/c/", (await store.registry.list("/c/")).revision + 1)
    outcome = await store.registry.transact(
        [Compare(key="/c/a", revision=0)],
        [Put(key="/c/a", value=b"1"), Delete(key="/c/b"), Get(key="/c/none")],
    )
    events = await take(watch, 2)
    assert {e.key: e.entry is None for e in events} == {"/c/a": False, "/c/b": True}
    assert {e.revision for e in events} == {outcome.revision}
    assert outcome.entries == (None,)
    refused = await store.registry.transact(
        [Compare(key="/c/a", revision=0)], [Put(key="/c/x", value=b""), Delete(key="/c/a")]
    )
    assert not refused.succeeded
    assert await store.registry.get("/c/x") is None


async def test_a_transaction_that_writes_a_key_twice_or_is_huge_is_refused(store: Store) -> None:
    put = Put(key="/c/a", value=b"")
    with pytest.raises(RequestError):
        await store.registry.transact((), [put, Delete(key="/c/a")])
    with pytest.raises(RequestError):
        await store.registry.transact((), [Put(key=f"/c/{i}", value=b"") for i in range(33)])


async def test_concurrent_writers_see_one_order(store: Store) -> None:
    """A counter that is only swapped: every success adds exactly one, whoever made it."""
    await store.registry.put("/c/counter", b"0")
    wins: list[tuple[int, int]] = []

    async def add(registry: Registry, rng: random.Random) -> None:
        for _ in range(8):
            entry = await registry.get("/c/counter")
            assert entry is not None
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            value = int(entry.value) + 1
            swapped = await registry.transact(
                [Compare(key="/c/counter", revision=entry.mod_revision)],
                [Put(key="/c/counter", value=str(value).encode())],
            )
            if swapped.succeeded:
                wins.append((swapped.revision, value))

    both = [store.registry, store.other]
    await asyncio.gather(*(add(both[i % 2], random.Random(i)) for i in range(4)))
    final = await store.registry.get("/c/counter")
    assert final is not None
    assert [value for _, value in sorted(wins)] == list(range(1, int(final.value) + 1))
    assert len(wins) < 32, "no two writers ever met: the test shows nothing"


# -- leases -----------------------------------------------------------------------------------------------


async def test_a_lease_that_is_not_renewed_takes_its_keys_along(store: Store) -> None:
    lease = await store.registry.grant(store.min_ttl_s)
    await store.registry.put("/c/mine", b"1", lease.lease_id)
    await store.registry.put("/c/free", b"1")
    entry = await store.other.get("/c/mine")
    assert entry is not None
    assert entry.lease == lease.lease_id
    watch = store.other.watch("/c/", entry.mod_revision + 2)
    gone = asyncio.create_task(take(watch, 1))
    await store.pass_time(lease.ttl_s + 0.1)
    (event,) = await gone
    assert (event.key, event.entry) == ("/c/mine", None)
    assert await store.registry.get("/c/mine") is None
    assert await store.registry.get("/c/free") is not None
    assert not await store.registry.keep_alive(lease.lease_id)
    with pytest.raises(LeaseGone):
        await store.registry.put("/c/mine", b"2", lease.lease_id)


async def test_a_renewed_lease_lives_on(store: Store) -> None:
    lease = await store.registry.grant(store.min_ttl_s)
    await store.registry.put("/c/mine", b"1", lease.lease_id)
    for _ in range(4):
        await store.pass_time(lease.ttl_s * 0.4)
        assert await store.registry.keep_alive(lease.lease_id)
    assert await store.registry.get("/c/mine") is not None


async def test_a_revoked_lease_is_gone_at_once(store: Store) -> None:
    lease = await store.registry.grant(60)
    await store.registry.transact((), [Put(key=f"/c/{i}", value=b"", lease=lease.lease_id) for i in range(3)])
    assert await store.registry.keep_alive(lease.lease_id)
    await store.other.revoke(lease.lease_id)
    await store.other.revoke(lease.lease_id)
    assert (await store.registry.list("/c/")).entries == ()
    assert not await store.registry.keep_alive(lease.lease_id)


async def test_a_key_follows_its_last_put_not_its_first_lease(store: Store) -> None:
    lease = await store.registry.grant(60)
    await store.registry.put("/c/a", b"1", lease.lease_id)
    await store.registry.put("/c/a", b"2")
    await store.registry.revoke(lease.lease_id)
    assert await store.registry.get("/c/a") is not None


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 1e9, float("nan")])
async def test_odd_times_to_live_are_refused(store: Store, ttl_s: float) -> None:
    with pytest.raises(RequestError):
        await store.registry.grant(ttl_s)


async def test_an_unknown_lease_is_gone(store: Store) -> None:
    assert not await store.registry.keep_alive(123456789)
    with pytest.raises(LeaseGone):
        await store.registry.put("/c/a", b"", 123456789)


# -- watches ------------------------------------------------------------------------------------------------


async def test_a_watch_tells_every_change_in_order_from_any_revision(store: Store) -> None:
    begin = (await store.registry.list("/c/")).revision + 1
    rng = random.Random(5)
    live: set[str] = set()
    expected: list[tuple[str, bytes | None]] = []
    watch = store.other.watch("/c/w/", begin)
    early = asyncio.create_task(take(watch, 40))
    for number in range(40):
        key = f"/c/w/{rng.randrange(6)}"
        if key in live and rng.random() < 0.4:
            await store.registry.delete(key)
            live.discard(key)
            expected.append((key, None))
        else:
            value = str(number).encode()
            await store.registry.put(key, value)
            live.add(key)
            expected.append((key, value))
        await store.registry.put("/c/elsewhere", b"")
    for events in (await early, await take(store.other.watch("/c/w/", begin), 40)):
        assert [(e.key, e.entry.value if e.entry else None) for e in events] == expected
        revisions = [e.revision for e in events]
        assert revisions == sorted(set(revisions))
    half = events[20].revision
    later = await take(store.registry.watch("/c/w/", half), 20)
    assert later == events[20:]


async def test_a_watch_from_a_compacted_revision_is_lost_and_a_listing_heals_it(store: Store) -> None:
    first = await store.registry.put("/c/a", b"1")
    await store.registry.put("/c/a", b"2")
    last = await store.registry.put("/c/b", b"3")
    await store.compact(last)
    with pytest.raises(WatchLost) as lost:
        await take(store.registry.watch("/c/", first), 1)
    assert lost.value.reason == "compacted"
    listing = await store.registry.list("/c/")
    assert [(e.key, e.value) for e in listing.entries] == [("/c/a", b"2"), ("/c/b", b"3")]
    watch = store.registry.watch("/c/", listing.revision + 1)
    await store.registry.delete("/c/a")
    (event,) = await take(watch, 1)
    assert (event.key, event.entry) == ("/c/a", None)


async def test_a_watch_can_be_left(store: Store) -> None:
    begin = await store.registry.put("/c/a", b"1")
    watch = store.registry.watch("/c/", begin)
    await take(watch, 1)
    waiting = asyncio.create_task(take(watch, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await store.registry.get("/c/a") is not None


async def test_after_close_everything_is_refused(store: Store) -> None:
    begin = await store.other.put("/c/a", b"1")
    watch = store.other.watch("/c/", begin + 1)
    waiting = asyncio.create_task(take(watch, 1))
    await asyncio.sleep(0.01)
    await store.other.close()
    with pytest.raises(WatchLost):
        await waiting
    with pytest.raises(RegistryError):
        await store.other.get("/c/a")
