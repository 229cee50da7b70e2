"""Bugs planted into the hand-over are found within a few schedules; a few lines show that faults strike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from xllm.engine.kvtransfer.base import Manifest, Slots
from xllm.engine.memory.leases import Leases
from xllm.engine.moving import receiver, sender
from xllm.engine.moving.outgoing import Outgoing, manifest_of
from xllm.engine.scheduler import claim
from xllm.service.handover.moves import Moves
from xllm.simulation import receiving, sending
from xllm.simulation.hand_over import PAGE_BYTES, HandOvers
from xllm.simulation.network import Wire
from xllm.simulation.run import Report, run_schedule
from xllm.simulation.schedule import Fault, FaultKind, Schedule, make_schedule

NUM_SEEDS = 40

Patch = pytest.MonkeyPatch


def handed_over(seed: int, *kinds: FaultKind, one_sided: bool = True, page_ms: float = 1.0) -> Schedule:
    """The requests of a seed on two instances, each handed over; faults at the first transfers."""
    schedule = make_schedule(seed)
    faults = tuple(
        Fault(at_s=0.0, kind=kind, instance=0, lasts_s=3.0, amount=0.3) for kind in kinds for _ in range(3)
    )
    return replace(
        schedule,
        starts_s=(0.0, 0.0),
        faults=faults,
        requests=tuple(
            replace(r, at_s=r.at_s / 4, habit="read", deadline_ms=None) for r in schedule.requests
        ),
        front=replace(schedule.front, transfer_mode="push"),
        hand_overs=HandOvers(
            wire=Wire(bytes_per_s=1000 * PAGE_BYTES / page_ms, one_sided=one_sided), everyone=True
        ),
    )


def caught(schedules: Callable[[int], Schedule]) -> str:
    for seed in range(NUM_SEEDS):
        report = run_schedule(schedules(seed))
        if report.wrong:
            return " / ".join(report.wrong)
    raise AssertionError(f"{NUM_SEEDS} schedules did not find the bug")


def all_well(schedules: Callable[[int], Schedule], num_seeds: int = 6) -> list[Report]:
    reports = [run_schedule(schedules(seed)) for seed in range(num_seeds)]
    assert [what for report in reports for what in report.wrong] == []
    return reports


def test_requests_are_handed_over_and_their_kv_is_used() -> None:
    reports = all_well(handed_over)
    assert sum(report.handovers["prefill", "done"] for report in reports) > 10
    assert sum(report.num_claimed_rows for report in reports) > 1000


def test_pages_are_let_go_while_a_stopped_sender_still_writes(monkeypatch: Patch) -> None:
    give_up = receiving.Incoming.give_up

    def at_once(self: receiving.Incoming, *args: Any) -> None:
        give_up(self, *args)
        if not self.released:
            self._release()

    def schedule(seed: int) -> Schedule:
        return handed_over(seed, "stop_sender", page_ms=20.0)

    assert sum(report.num_link_faults_hit for report in all_well(schedule, 2)) >= 2
    monkeypatch.setattr(receiving.Incoming, "give_up", at_once)
    assert "hold others' tokens" in caught(schedule)


def test_a_checksum_that_is_not_looked_at(monkeypatch: Patch) -> None:
    def schedule(seed: int) -> Schedule:
        return handed_over(seed, "link_corrupt")

    all_well(schedule, 2)
    monkeypatch.setattr(receiving, "checksum", lambda content: 0)
    monkeypatch.setattr(sending, "checksum", lambda content: 0)
    assert "hold others' tokens" in caught(schedule)


def test_tables_over_the_wrong_pages_of_what_arrived(monkeypatch: Patch) -> None:
    take = Leases.take

    def from_behind(self: Leases, slots: Slots, *args: Any) -> Any:
        return take(self, tuple(tuple(reversed(group)) for group in slots), *args)

    monkeypatch.setattr(Leases, "take", from_behind)
    assert "others' tokens" in caught(handed_over)


def test_a_manifest_that_speaks_of_another_request(monkeypatch: Patch) -> None:
    """Its tokens are not compared, and pages of the request before are claimed by the next one."""
    manifests: list[Manifest] = []

    def last_one(move: Outgoing) -> Manifest:
        manifests.append(manifest_of(move))
        return manifests[-2] if len(manifests) > 1 else manifests[-1]

    monkeypatch.setattr(sender, "manifest_of", last_one)
    all_well(handed_over, 2)
    monkeypatch.setattr(claim, "_usable", lambda seq, state: min(state.num_computed, len(seq.tokens) - 1))
    caught(handed_over)


def test_leases_that_nobody_claims_and_nobody_ends(monkeypatch: Patch) -> None:
    def schedule(seed: int) -> Schedule:
        return handed_over(seed, "link_mute")

    monkeypatch.setattr(receiver, "UNCLAIMED_S", float("inf"))
    monkeypatch.setattr(receiver.Receiver, "cancel", lambda self, transfer_id: None)
    assert "held by transfers" in caught(schedule)


def test_sequences_that_hold_still_for_ever_where_they_came_from(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Moves, "release", lambda self, move: None)
    assert "still has requests" in caught(handed_over)
