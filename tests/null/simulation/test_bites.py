"""The simulation finds what it is for: each planted bug is caught within a few schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from xllm.engine.memory.manager import PageManager
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.service.dispatch import Dispatch
from xllm.service.failover.detector import Detector
from xllm.service.instances.instance import Instance
from xllm.service.journal import RequestJournal
from xllm.service.placer import Placer
from xllm.simulation.link import EngineEnd
from xllm.simulation.run import run_schedule
from xllm.simulation.schedule import Fault, Schedule, make_schedule
from xllm.simulation.shrink import shrink
from xllm.types import TokenSegment

NUM_SEEDS = 60

Patch = pytest.MonkeyPatch


def zombies(seed: int) -> Schedule:
    """The requests of a seed on one instance that stops for long enough to be suspected, twice."""
    faults = tuple(Fault(at_s=at_s, kind="stop", instance=0, lasts_s=3.0) for at_s in (0.05, 4.0))
    schedule = make_schedule(seed)
    requests = tuple(replace(r, at_s=0.0, habit="read", deadline_ms=None) for r in schedule.requests)
    return replace(schedule, starts_s=(0.0,), faults=faults, requests=requests)


def caught(schedules: Callable[[int], Schedule] = make_schedule) -> tuple[int, str]:
    """The first seed that fails and what it says; fails itself if none does."""
    for seed in range(NUM_SEEDS):
        report = run_schedule(schedules(seed))
        if report.wrong:
            return seed, " / ".join(report.wrong)
    raise AssertionError(f"{NUM_SEEDS} schedules did not find the bug")


def test_frames_of_old_attempts(monkeypatch: Patch) -> None:
    """The end that an aborted attempt reports is taken for the request's own."""
    absorb = RequestJournal.absorb

    def anything(self: RequestJournal, frame: Any) -> Any:
        return absorb(self, msgspec.structs.replace(frame, attempt=self.attempt))

    def from_anywhere(self: Dispatch, instance: Instance, frame: Any) -> None:
        if (ticket := self.tickets.get(frame.request_id)) is not None:
            ticket.live.deliver(frame)

    monkeypatch.setattr(RequestJournal, "absorb", anything)
    monkeypatch.setattr(Dispatch, "deliver", from_anywhere)
    assert "request" in caught(zombies)[1]


def test_output_that_becomes_prompt_when_it_is_resumed(monkeypatch: Patch) -> None:
    """What others do: emitted tokens are appended to the prompt, and offsets start anew."""
    begin = RequestJournal.begin_attempt

    def as_prompt(self: RequestJournal, *args: Any) -> Any:
        spec = begin(self, *args)
        if spec.params.n > 1 or not any(spec.emitted):
            return spec
        return msgspec.structs.replace(
            spec, segments=(*spec.segments, TokenSegment(spec.emitted[0])), emitted=()
        )

    monkeypatch.setattr(RequestJournal, "begin_attempt", as_prompt)
    assert "request" in caught()[1]


def test_text_state_that_is_lost_when_a_request_is_resumed(monkeypatch: Patch) -> None:
    begin = RequestJournal.begin_attempt

    def forgetful(self: RequestJournal, *args: Any) -> Any:
        spec = begin(self, *args)
        for log in self.choices:
            log.text.finish()
        return spec

    monkeypatch.setattr(RequestJournal, "begin_attempt", forgetful)
    assert "text" in caught()[1]


def test_a_page_that_an_abort_loses(monkeypatch: Patch) -> None:
    abort = Scheduler.abort

    def leaky(self: Scheduler, request_id: str, *args: Any) -> bool:
        for (_, known), request in self._books.requests.items():
            for seq in request.sequences:
                if known == request_id and seq.table is not None and seq.table.num_pages:
                    seq.table.pages[0].pop()
        return abort(self, request_id, *args)

    monkeypatch.setattr(Scheduler, "abort", leaky)
    assert "pages are owned" in caught()[1]


def test_a_cached_page_that_is_written_again(monkeypatch: Patch) -> None:
    """A hit on a page that another sequence is given as well: wrong KV, hence wrong tokens."""

    def steal(self: PageManager, table: Any) -> None:
        for pool, group in zip(self._pools, table.pages, strict=True):
            for page in reversed(group):
                if page >= 0:
                    pool.release(page)
                    if pool._refs[page] == 0 and page in pool._reusable:
                        del pool._reusable[page]
                        pool._free[page] = None
            group.clear()
        table.chain.clear()
        table.planned = None

    monkeypatch.setattr(PageManager, "release", steal)
    caught()


def test_an_index_that_keeps_the_dead(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Placer, "forget", lambda self, name: None)
    assert "the index still knows" in caught()[1]


def test_a_request_that_is_forgotten_on_its_second_move(monkeypatch: Patch) -> None:
    judge = Dispatch.judge

    def forgetful(self: Dispatch, request_ids: Any, *more: Any) -> None:
        judge(self, [r for r in request_ids if r in self.tickets and self.tickets[r].num_moves < 2], *more)

    monkeypatch.setattr(Dispatch, "judge", forgetful)
    assert "never ended" in caught(zombies)[1]


def test_a_detector_that_sleeps(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Detector, "_overdue", lambda self, watched, now_s: None)
    assert "not found out" in caught()[1]


def test_a_detector_that_is_too_eager(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Detector, "_limit_s", lambda self, predicted_s, told: 0.4)
    assert "for no reason" in caught()[1]


def test_an_engine_that_repeats_itself_with_other_tokens(monkeypatch: Patch) -> None:
    """A nonsense token in place of the right one, now and then."""
    original = EngineEnd.send
    count = iter(range(10**9))

    def lying(self: EngineEnd, message: Any) -> None:
        frames = getattr(message, "frames", ())
        if frames and frames[0].tokens and next(count) % 50 == 49:
            wrong = msgspec.structs.replace(frames[0], tokens=(5,) * len(frames[0].tokens))
            message = msgspec.structs.replace(message, frames=(wrong, *frames[1:]))
        original(self, message)

    monkeypatch.setattr(EngineEnd, "send", lying)
    assert "the run alone" in caught()[1]


def test_a_failing_schedule_gets_smaller_and_still_fails(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Placer, "forget", lambda self, name: None)
    seed, _ = caught()
    schedule = make_schedule(seed)

    def fails(candidate: Schedule) -> bool:
        return any("index still knows" in what for what in run_schedule(candidate).wrong)

    small = shrink(schedule, fails, max_runs=60)
    assert fails(small)
    assert len(small.requests) + len(small.faults) <= len(schedule.requests) + len(schedule.faults)
    assert small == replace(small, seed=seed)
