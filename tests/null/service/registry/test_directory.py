"""A front's view of the members under every lie a registry can tell: F27, F31, F32, F33."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from tests.null.service.registry.conftest import Town, record, until
from xllm.service.registry.address import Address
from xllm.service.registry.base import Event
from xllm.service.registry.directory import Change, RegistryDirectory, StaticDirectory
from xllm.service.registry.record import decode_record, encode_record, member_key

RELIST_S = 0.02


class Seen:
    """Applies changes to a view of its own, as a front does; it must always equal the directory's."""

    def __init__(self, town: Town, relist_s: float = RELIST_S) -> None:
        self.directory = RegistryDirectory(town.registry, "c", "instances", relist_s=relist_s)
        self.view: dict[str, str] = {}
        self.changes: list[Change] = []

    def start(self) -> None:
        self.directory.start(self.on_change)

    def on_change(self, change: Change) -> None:
        self.changes.append(change)
        for member in change.joined:
            assert member.record.member_id not in self.view, "joined twice"
            self.view[member.record.member_id] = member.record.incarnation
        for member in change.left:
            del self.view[member.record.member_id]
        for member in change.changed:
            assert member.record.member_id in self.view
            self.view[member.record.member_id] = member.record.incarnation


async def write(town: Town, name: str, incarnation: str = "i1", **fields: object) -> None:
    value = encode_record(record(name, incarnation, **fields))
    await town.inner.put(member_key("c", "instances", name), value)


async def erase(town: Town, name: str) -> None:
    await town.inner.delete(member_key("c", "instances", name))


async def test_members_join_change_and_leave(town: Town) -> None:
    seen = Seen(town, relist_s=60.0)
    await write(town, "a")
    seen.start()
    await until(lambda: seen.view == {"a": "i1"})
    await write(town, "b")
    await write(town, "a", "i2")
    await until(lambda: seen.view == {"a": "i2", "b": "i1"})
    await erase(town, "a")
    await until(lambda: seen.view == {"b": "i1"})
    await write(town, "b", state="draining")
    await until(lambda: seen.directory.members["b"].record.state == "draining")
    assert seen.directory.num_relists == 1
    await seen.directory.close()


def drop(event: Event) -> list[Event]:
    return []


def twice(event: Event) -> list[Event]:
    return [event, event]


class Swapped:
    """Tells two events in the wrong order."""

    def __init__(self) -> None:
        self.kept: Event | None = None

    def __call__(self, event: Event) -> list[Event]:
        if self.kept is None:
            self.kept = event
            return []
        kept, self.kept = self.kept, None
        return [event, kept]


class Delayed:
    """Tells an event only after five others."""

    def __init__(self) -> None:
        self.kept: list[Event] = []

    def __call__(self, event: Event) -> list[Event]:
        self.kept.append(event)
        return [self.kept.pop(0)] if len(self.kept) > 5 else []


@pytest.mark.parametrize("mangle", [lambda: drop, lambda: twice, Swapped, Delayed])
async def test_lost_repeated_reordered_and_delayed_events_are_healed(
    town: Town, mangle: Callable[[], Callable[[Event], list[Event]]]
) -> None:
    """F33, with the truth changing under the watch all the while."""
    town.registry.mangle = mangle()
    seen = Seen(town)
    seen.start()
    rng = random.Random(7)
    truth: dict[str, str] = {}
    for number in range(60):
        name = f"m{rng.randrange(5)}"
        if name in truth and rng.random() < 0.4:
            await erase(town, name)
            del truth[name]
        else:
            truth[name] = f"i{number}"
            await write(town, name, truth[name])
        await asyncio.sleep(0.001)
    await write(town, "last")
    truth["last"] = "i1"
    await until(lambda: seen.view == truth)
    assert town.registry.num_faults > 0
    assert seen.directory.num_relists > 1
    await seen.directory.close()


async def test_an_outage_keeps_the_last_view_and_ends_with_the_truth(town: Town) -> None:
    """F27."""
    await write(town, "a")
    await write(town, "b")
    seen = Seen(town)
    seen.start()
    await until(lambda: len(seen.view) == 2)
    town.registry.down = True
    await erase(town, "a")
    await write(town, "c")
    faults = town.registry.num_faults
    await until(lambda: town.registry.num_faults > faults + 2)
    assert seen.view == {"a": "i1", "b": "i1"}
    town.registry.down = False
    await until(lambda: seen.view == {"b": "i1", "c": "i1"})
    await seen.directory.close()


async def test_a_sudden_empty_listing_is_doubted_until_it_is_repeated(town: Town) -> None:
    await write(town, "a")
    seen = Seen(town)
    seen.start()
    await until(lambda: "a" in seen.view)
    relists = seen.directory.num_relists
    town.registry.empty = True
    await until(lambda: seen.directory.view.num_empty_doubted == 2)
    assert seen.view == {"a": "i1"}
    assert seen.directory.num_relists >= relists + 2
    town.registry.empty = False
    await until(lambda: seen.directory.num_relists >= relists + 5)
    assert seen.view == {"a": "i1"}, "two empty listings and a full one must not add up to three"
    town.registry.empty = True
    await until(lambda: seen.view == {})
    await seen.directory.close()


async def test_the_last_member_may_leave_in_order(town: Town) -> None:
    await write(town, "a")
    seen = Seen(town, relist_s=60.0)
    seen.start()
    await until(lambda: "a" in seen.view)
    await erase(town, "a")
    await until(lambda: seen.view == {})
    await seen.directory.close()


async def test_a_compaction_leads_to_a_new_listing_without_ghosts(town: Town) -> None:
    """F32: the watch is cut, what it missed is compacted away."""
    await write(town, "a")
    await write(town, "b")
    seen = Seen(town, relist_s=60.0)
    seen.start()
    await until(lambda: len(seen.view) == 2)
    town.registry.down = True
    await erase(town, "a")
    await write(town, "c")
    town.inner.compact((await town.inner.list("/c/")).revision)
    town.registry.down = False
    await until(lambda: seen.view == {"b": "i1", "c": "i1"})
    assert seen.directory.num_watches_lost["disconnected"] == 1
    await seen.directory.close()


GARBAGE = {
    "garbage": b"\xff\x00{",
    "not an object": b"[1,2,3]",
    "deep": b"[" * 2000,
    "unknown_version": b'{"version": 99, "member_id": "x", "incarnation": "i", "address": "h:1"}',
    "too_big": b'{"version": 1, "pad": "' + b"x" * 4100 + b'"}',
    "wrong_id": encode_record(record("another")),
    "unix path": encode_record(record("x", address="/run/secret.sock")),
    "no port": encode_record(record("x", address="host")),
    "odd port": encode_record(record("x", address="host:99999")),
    "user": encode_record(record("x", address="user@host:1")),
    "two lines": encode_record(record("x", address="host\nx:1")),
    "no incarnation": encode_record(record("x", "")),
    "phase": encode_record(record("x", phases=("mining",))),
    "many models": encode_record(record("x", model_ids=tuple(str(i) for i in range(17)))),
    "wrong type": b'{"version": 1, "member_id": "x", "incarnation": "i", "address": "h:1", "pid": "7"}',
    "bad state": b'{"version": 1, "member_id": "x", "incarnation": "i", "address": "h:1", "state": "king"}',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_nothing_but_a_sound_record_is_a_record(name: str) -> None:
    """F31."""
    found = decode_record("/c/v1/instances/x", GARBAGE[name])
    assert isinstance(found, str)


def test_a_record_of_a_newer_program_with_more_fields_is_read() -> None:
    value = encode_record(record("x"))[:-1] + b',"later":{"a":1}}'
    assert decode_record("/c/v1/instances/x", value) == record("x")


async def test_garbage_is_ignored_and_counted_and_hides_nobody(town: Town) -> None:
    await write(town, "good")
    seen = Seen(town)
    seen.start()
    await until(lambda: "good" in seen.view)
    await town.inner.put("/c/v1/instances/good", b"overwritten")
    await town.inner.put("/c/v1/instances/x", GARBAGE["unknown_version"])
    await until(lambda: {"garbage", "unknown_version"} <= set(seen.directory.view.num_ignored))
    assert seen.view == {"good": "i1"}, "a member whose record was spoilt is still there"
    relists = seen.directory.num_relists
    await until(lambda: seen.directory.num_relists > relists + 1)
    assert seen.view == {"good": "i1"}
    await write(town, "good", "i2")
    await until(lambda: seen.view == {"good": "i2"})
    await seen.directory.close()


async def test_another_store_behind_the_same_address_is_read_as_it_is(town: Town) -> None:
    """A wiped registry counts its revisions from the start again."""
    for number in range(50):
        await write(town, "a", f"i{number}")
    seen = Seen(town)
    seen.start()
    await until(lambda: seen.view == {"a": "i49"})
    fresh = type(town.inner)(town.clock)
    old, town.registry.inner = town.registry.inner, fresh
    town.registry.down = True
    town.inner = fresh
    await write(town, "a", "again")
    await write(town, "b")
    town.registry.down = False
    await until(lambda: seen.view == {"a": "again", "b": "i1"})
    await write(town, "a", "later")
    await until(lambda: seen.view["a"] == "later")
    await seen.directory.close()
    await old.close()


async def test_fixed_addresses_are_members_without_a_registry() -> None:
    changes: list[Change] = []
    directory = StaticDirectory([Address("127.0.0.1", 1), Address("::1", 2)])
    directory.start(changes.append)
    assert [m.record.address for m in changes[0].joined] == ["127.0.0.1:1", "[::1]:2"]
    assert set(directory.members) == {"127.0.0.1:1", "[::1]:2"}
    await directory.close()
