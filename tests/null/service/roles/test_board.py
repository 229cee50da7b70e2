"""The board of roles: epochs, transitions, what is remembered, and which sets of roles may be left."""

from __future__ import annotations

import pytest

from xllm.errors import NotFoundError, RequestError
from xllm.service.roles.board import MAX_GONE, Phases, RoleBoard, keeps_floors
from xllm.types import DECODE, MIXED, PREFILL


def board(**roles: Phases) -> RoleBoard:
    made = RoleBoard()
    for name, phases in roles.items():
        made.joined(name, phases, 0.0)
    return made


def test_an_instance_stands_where_it_started() -> None:
    standing = board(a=PREFILL).standing("a")
    assert (standing.role, standing.pool, standing.reason) == ("prefill", "prefill", "started")


def test_nobody_told_of_it_so_it_does_everything() -> None:
    assert RoleBoard().standing("x").phases == MIXED


def test_a_switching_instance_is_in_a_pool_between_two_until_the_old_phase_is_worked_off() -> None:
    made = board(a=DECODE)
    made.switch("a", PREFILL, 1.0, "ttft")
    standing = made.standing("a")
    assert standing.phases == PREFILL, "it takes new work at once"
    assert standing.old_phases == DECODE
    assert standing.pool == "decode-to-prefill"
    made.drained("a", "prefill")
    assert made.standing("a").old_phases == DECODE, "that was not what it works off"
    made.drained("a", "decode")
    assert made.standing("a").pool == "prefill"


def test_becoming_mixed_leaves_nothing_to_work_off() -> None:
    made = board(a=DECODE)
    assert made.switch("a", MIXED, 1.0, "ttft").pool == "mixed"


def test_back_before_the_old_phase_was_worked_off_is_a_transition_the_other_way() -> None:
    made = board(a=DECODE)
    made.switch("a", PREFILL, 1.0, "ttft")
    standing = made.switch("a", DECODE, 2.0, "tpot")
    assert standing.old_phases == PREFILL
    assert standing.pool == "prefill-to-decode"


def test_epochs_grow_and_are_never_used_twice() -> None:
    made = board(a=DECODE, b=DECODE)
    seen = [made.standing("a").epoch, made.standing("b").epoch]
    seen += [made.switch(n, p, 1.0, "x").epoch for n, p in (("a", PREFILL), ("b", MIXED), ("a", DECODE))]
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_switch_upon_an_epoch_that_is_not_the_present_one_is_a_conflict_that_names_it(off_by: int) -> None:
    made = board(a=DECODE)
    epoch = made.switch("a", MIXED, 1.0, "x").epoch
    with pytest.raises(RequestError, match=f"epoch is {epoch} now") as refused:
        made.switch("a", PREFILL, 2.0, "operator", epoch=epoch + off_by)
    assert (refused.value.code, refused.value.param) == ("conflict", "epoch")
    assert made.standing("a").phases == MIXED
    assert made.switch("a", PREFILL, 2.0, "operator", epoch=epoch).phases == PREFILL


def test_the_same_role_again_changes_no_epoch_and_counts_as_nothing_but_may_pin() -> None:
    made = board(a=DECODE)
    before = made.standing("a")
    after = made.switch("a", DECODE, 5.0, "operator", pinned=True)
    assert after.epoch == before.epoch
    assert after.pinned
    assert not made.num_switches


def test_switches_are_counted_by_from_to_and_reason() -> None:
    made = board(a=DECODE, b=DECODE)
    for name in "ab":
        made.switch(name, PREFILL, 1.0, "ttft")
    assert made.num_switches == {("decode", "prefill", "ttft"): 2}


def test_an_instance_that_comes_back_goes_on_in_the_role_that_it_was_given_without_old_work() -> None:
    made = board(a=DECODE)
    epoch = made.switch("a", PREFILL, 1.0, "ttft").epoch
    made.left("a")
    with pytest.raises(NotFoundError):
        made.switch("a", DECODE, 2.0, "operator")
    back = made.joined("a", DECODE, 3.0)
    assert (back.phases, back.old_phases, back.unproven, back.epoch) == (
        PREFILL,
        frozenset(),
        frozenset(),
        epoch,
    )


def test_names_that_are_gone_are_forgotten_in_the_end() -> None:
    made = RoleBoard()
    for i in range(MAX_GONE + 10):
        made.joined(f"i{i}", DECODE, 0.0)
        made.left(f"i{i}")
    assert len(made._standings) == MAX_GONE
    assert made.standings() == {}


def test_what_was_gained_is_unproven_until_it_has_worked() -> None:
    made = board(a=PREFILL)
    assert made.switch("a", MIXED, 1.0, "tpot").unproven == DECODE
    made.proven("a", "prefill")
    assert made.standing("a").unproven == DECODE
    made.proven("a", "decode")
    assert not made.standing("a").unproven


@pytest.mark.parametrize(
    ("before", "after", "may"),
    [
        ((PREFILL, DECODE), (PREFILL, PREFILL), False),
        ((PREFILL, DECODE), (DECODE, DECODE), False),
        ((PREFILL, DECODE), (MIXED, DECODE), True),
        ((PREFILL, DECODE), (PREFILL, MIXED), True),
        ((PREFILL, DECODE, DECODE), (PREFILL, PREFILL, DECODE), True),
        ((PREFILL, PREFILL, DECODE, DECODE), (PREFILL, PREFILL, PREFILL, DECODE), False),
        ((PREFILL, PREFILL, DECODE, DECODE), (PREFILL, PREFILL, MIXED, DECODE), True),
        # Begun below the floor: no worse, and better is welcome.
        ((PREFILL, PREFILL, PREFILL, DECODE), (PREFILL, PREFILL, DECODE, DECODE), True),
        ((PREFILL, PREFILL, PREFILL, DECODE), (PREFILL, MIXED, PREFILL, PREFILL), True),
        ((PREFILL, PREFILL, PREFILL, DECODE), (PREFILL, PREFILL, PREFILL, PREFILL), False),
    ],
)
def test_floors(before: tuple[Phases, ...], after: tuple[Phases, ...], may: bool) -> None:
    assert keeps_floors(before, after) is may
