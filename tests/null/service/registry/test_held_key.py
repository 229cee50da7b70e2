"""Claims, renewals, fences and self-demotion, step by step on a fake clock; membership and leaders on top."""

from __future__ import annotations

import asyncio

import pytest

from tests.null.service.registry.conftest import Town, record, until
from xllm.errors import ConfigError
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.base import RegistryError
from xllm.service.registry.held_key import HeldKey
from xllm.service.registry.leader import Fence, Leadership
from xllm.service.registry.membership import Membership
from xllm.service.registry.record import decode_record, encode_record, member_key

KEY = "/c/v1/instances/one"
TTL_S = 6.0


def held(town: Town, key: str = KEY) -> HeldKey:
    return HeldKey(town.registry, key, ttl_s=TTL_S, clock=town.clock)


def member(town: Town, incarnation: str = "i1", ttl_s: float = TTL_S) -> Membership:
    return Membership(
        town.registry,
        "c",
        "instances",
        record(incarnation=incarnation),
        ttl_s=ttl_s,
        clock=town.clock,
        backoff=Backoff(0.001, 0.001),
    )


async def stored(town: Town) -> bytes | None:
    entry = await town.inner.get(KEY)
    return None if entry is None else entry.value


# -- the key ----------------------------------------------------------------------------------------------


async def test_one_of_two_gets_the_key_and_the_other_learns_who(town: Town) -> None:
    one, two = held(town), held(town)
    assert await one.claim(b"one") is None
    other = await two.claim(b"two")
    assert other is not None
    assert other.value == b"one"
    assert (one.held, two.held) == (True, False)
    assert not await two.update(b"mine")
    assert await stored(town) == b"one"


async def test_a_successor_has_a_greater_epoch_and_the_sleeper_cannot_write_over_it(town: Town) -> None:
    one, two = held(town), held(town)
    await one.claim(b"one")
    first = one.epoch
    town.pass_time(TTL_S + 1)
    assert await stored(town) is None
    assert await two.claim(b"two") is None
    assert two.epoch > first
    assert not await one.update(b"one, late")
    assert not one.held
    assert await stored(town) == b"two"
    assert not await one.renew(b"one")


async def test_it_stops_acting_at_two_thirds_of_the_lease_without_asking_anybody(town: Town) -> None:
    key = held(town)
    await key.claim(b"")
    town.registry.down = True
    town.clock.advance(TTL_S * 2 / 3 - 0.1)
    assert key.may_act()
    town.clock.advance(0.2)
    assert not key.may_act()
    assert key.held, "the registry has not taken it away yet; only acting ends early"
    town.registry.down = False
    assert await key.renew(b"")
    assert key.may_act()


async def test_a_renewal_counts_from_before_it_was_sent(town: Town) -> None:
    key = held(town)
    await key.claim(b"")
    keep_alive = town.inner.keep_alive

    async def slow(lease_id: int) -> bool:
        kept = await keep_alive(lease_id)
        town.clock.advance(3.0)
        return kept

    town.inner.keep_alive = slow  # type: ignore[method-assign]
    assert await key.renew(b"")
    town.clock.advance(TTL_S * 2 / 3 - 3.0 + 0.1)
    assert not key.may_act()


async def test_a_claim_whose_answer_was_lost_is_recognised_as_ours(town: Town) -> None:
    key = held(town)
    town.registry.lose_answer = True
    with pytest.raises(RegistryError):
        await key.claim(b"one")
    assert not key.held
    assert await stored(town) == b"one"
    assert await key.claim(b"one") is None
    assert key.held


async def test_an_update_whose_answer_was_lost_is_put_right_by_the_next_renewal(town: Town) -> None:
    key = held(town)
    await key.claim(b"one")
    epoch = key.epoch
    town.registry.lose_answer = True
    with pytest.raises(RegistryError):
        await key.update(b"two")
    assert await key.renew(b"three")
    assert await stored(town) == b"three"
    assert key.epoch == epoch


@pytest.mark.parametrize("how", ["deleted", "overwritten", "revoked"])
async def test_what_an_operator_did_to_the_key_is_noticed_and_repaired(town: Town, how: str) -> None:
    key = held(town)
    await key.claim(b"one")
    entry = await town.inner.get(KEY)
    assert entry is not None
    if how == "deleted":
        await town.inner.delete(KEY)
    elif how == "overwritten":
        await town.inner.put(KEY, b"\xffgarbage")
    else:
        await town.inner.revoke(entry.lease)
    before = key.epoch
    assert not await key.renew(b"one")
    assert not key.held
    assert await key.claim(b"one") is None
    assert await stored(town) == b"one"
    assert key.epoch > before


async def test_release_frees_the_key_at_once(town: Town) -> None:
    one, two = held(town), held(town)
    await one.claim(b"one")
    await one.release()
    assert await two.claim(b"two") is None


# -- membership -------------------------------------------------------------------------------------------


async def test_a_member_registers_lives_on_and_leaves(town: Town) -> None:
    one = member(town)
    one.start()
    await one.join()
    found = decode_record(KEY, await stored(town) or b"")
    assert found == one.record
    assert one.epoch > 0
    assert await one.announce("draining")
    assert b"draining" in (await stored(town) or b"")
    await one.leave()
    assert await stored(town) is None


async def test_a_lost_lease_is_followed_by_a_new_registration_with_a_greater_epoch(town: Town) -> None:
    one = member(town, ttl_s=1.0)
    one.start()
    await one.join()
    first = one.epoch
    town.pass_time(1.5)
    assert await stored(town) is None, "the lease should have ended: the fault did not happen"
    await until(lambda: one.num_joins == 2)
    assert one.epoch > first
    assert await stored(town) == encode_record(one.record)
    await one.leave()


async def test_a_registry_that_comes_late_is_waited_for_and_said_once(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    town.registry.down = True
    one = member(town)
    one.start()
    await until(lambda: town.registry.num_faults > 5)
    assert one.epoch == 0
    town.registry.down = False
    await one.join()
    assert sum("serving goes on" in line for line in caplog.messages) == 1
    assert sum("answers again" in line for line in caplog.messages) == 1
    await one.leave()


async def test_a_live_stranger_under_the_same_name_is_refused_by_name(town: Town) -> None:
    """F62: the stranger keeps renewing, so its lease never ends."""
    stranger = held(town)
    await stranger.claim(encode_record(record(incarnation="other", address="10.0.0.1:5", pid=77)))
    two = member(town)
    two.start()
    refused = asyncio.create_task(two.join())
    while not refused.done():
        await asyncio.sleep(0.01)
        town.pass_time(1.0)
        assert await stranger.renew(await stored(town) or b"")
    with pytest.raises(ConfigError, match=r"'one' is taken by a live member at 10.0.0.1:5, pid 77"):
        await refused
    assert two.epoch == 0
    await two.leave()
    assert stranger.held


async def test_the_own_former_life_is_waited_out_until_its_lease_is_gone(town: Town) -> None:
    dead = held(town)
    await dead.claim(encode_record(record(incarnation="before")))
    one = member(town, "after", ttl_s=1.0)
    one.start()
    for _ in range(5):
        await asyncio.sleep(0.01)
        assert one.epoch == 0
    assert b"before" in (await stored(town) or b"")
    town.pass_time(TTL_S)
    await one.join()
    assert b"after" in (await stored(town) or b"")
    assert one.epoch > dead.epoch
    await one.leave()


async def test_a_member_that_lost_its_name_while_away_goes_on_serving(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    one = member(town, ttl_s=1.0)
    one.start()
    await one.join()
    town.pass_time(1.5)
    usurper = held(town)
    assert await usurper.claim(encode_record(record(incarnation="other"))) is None
    while not any("taken by a live member" in line for line in caplog.messages):
        await asyncio.sleep(0.01)
        town.clock.advance(0.3)
        await usurper.renew(await stored(town) or b"")
    assert one.epoch == 0
    assert b"other" in (await stored(town) or b"")
    await one.leave()
    assert b"other" in (await stored(town) or b""), "leaving took somebody else's key along"


async def test_leaving_while_the_registry_is_away_ends(town: Town) -> None:
    one = member(town)
    one.start()
    await one.join()
    town.registry.down = True
    assert not await one.announce("draining")
    await one.leave()
    town.pass_time(TTL_S)
    assert await town.inner.get(member_key("c", "instances", "one")) is None


# -- leaders ----------------------------------------------------------------------------------------------


def candidate(town: Town, name: str) -> Leadership:
    return Leadership(town.registry, "c", "roles", name, ttl_s=TTL_S, clock=town.clock)


async def test_there_is_one_leader_and_the_next_one_has_a_greater_epoch(town: Town) -> None:
    one, two = candidate(town, "one"), candidate(town, "two")
    await one.step()
    await two.step()
    first = one.epoch()
    assert first > 0
    assert two.epoch() == 0
    await one.close()
    await two.step()
    assert one.epoch() == 0
    assert two.epoch() > first
    await two.close()


async def test_a_paused_leader_steps_down_by_itself_before_another_can_win(town: Town) -> None:
    one, two = candidate(town, "one"), candidate(town, "two")
    await one.step()
    first = one.epoch()
    both: list[tuple[int, int]] = []
    won_at_s = None
    for _ in range(80):  # one is paused: it takes no step
        town.pass_time(0.1)
        await two.step()
        both.append((one.epoch(), two.epoch()))
        won_at_s = won_at_s or (town.clock.monotonic_s() if two.epoch() else None)
    assert won_at_s is not None, "nobody took over: the pause did nothing"
    assert not any(a and b for a, b in both)
    assert any(not a and not b for a, b in both), "there was no gap between the two leaders"
    fence = Fence()
    assert fence.admit(first)
    assert fence.admit(two.epoch())
    assert not fence.admit(first), "the old leader's late command went through"
    assert not fence.admit(0)
    await one.close()
    await two.close()


async def test_a_leader_campaigns_in_the_background(town: Town) -> None:
    one, two = candidate(town, "one"), candidate(town, "two")
    one.start()
    await until(lambda: one.epoch() > 0)
    two.start()
    await one.close()
    town.pass_time(TTL_S)
    await two.step()
    assert two.epoch() > 0
    await two.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"address": "nowhere"},
        {"model_ids": ("m" * 300,)},
        {"incarnation": ""},
        {"member_id": "a/b"},
        {"ttl_s": 0.1},
    ],
)
async def test_what_nobody_could_read_is_refused_before_it_is_written(
    town: Town, fields: dict[str, object]
) -> None:
    ttl_s = float(str(fields.pop("ttl_s", TTL_S)))
    with pytest.raises(ConfigError):
        Membership(
            town.registry,
            "c",
            "instances",
            record(**fields),
            ttl_s=ttl_s,
            clock=town.clock,  # type: ignore[arg-type]
        )
