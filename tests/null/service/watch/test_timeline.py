"""Timelines: the phases are the whole, memory is bounded, every name of a request finds it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.service.draft import RequestDraft
from xllm.service.failover.decision import MoveCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.router.base import Placement
from xllm.service.snapshot import RequestRecord
from xllm.service.stream import Delta, Usage
from xllm.service.watch.timeline import MAX_EVENTS, MAX_SCORES, PHASES
from xllm.service.watch.timelines import Timelines
from xllm.testing.clock import FakeClock
from xllm.types import RequestSpec, SamplingParams, TokenSegment

PROMPT = (11, 12, 13)


class Story:
    """One request told to a `Timelines`, with the time between the events."""

    def __init__(
        self, timelines: Timelines, clock: FakeClock, request_id: str = "r1", client: str = "c1"
    ) -> None:
        self.timelines, self.clock, self.id, self.client = timelines, clock, request_id, client

    def accept(self, admission_s: float = 0.0) -> None:
        received_s = self.clock.monotonic_s()
        self.clock.advance(admission_s)
        params = SamplingParams(max_tokens=4)
        draft = RequestDraft(
            model="m", prompt_token_ids=PROMPT, params=params, client_id=self.client, received_s=received_s
        )
        spec = RequestSpec(request_id=self.id, model="m", segments=(TokenSegment(PROMPT),), params=params)
        self.timelines.on_accepted(draft, spec)

    def place(self, instance: str = "a", attempt: int = 0, **more: object) -> None:
        placement = Placement(instance=instance, reasons=("because",), **more)  # type: ignore[arg-type]
        self.timelines.on_placed(self.id, placement, attempt)

    def output(self, after_s: float, queue_s: float | None = None, num_tokens: int = 1) -> None:
        self.clock.advance(after_s)
        if queue_s is not None:
            self.timelines.on_first(self.id, queue_s)
        delta = Delta(choice=0, token_ids=(5,) * num_tokens)
        self.timelines.on_delta(self.id, "m", delta, after_s, first=queue_s is not None)

    def end(self, after_s: float = 0.0, outcome: str = "stop") -> None:
        self.clock.advance(after_s)
        self.timelines.on_ended(record(self.id, outcome))

    def told(self) -> dict:  # type: ignore[type-arg]
        (found,) = self.timelines.find(self.id)
        return found


def cost(num_tokens: int) -> MoveCost:
    return MoveCost(recompute_tokens=num_tokens, recompute_ms=12.5, migrate_ms=None)


def record(request_id: str, outcome: str = "stop") -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        model="m",
        instance="a",
        outcome=outcome,
        finish_reasons=(outcome,),
        usage=Usage(prompt_tokens=3, completion_tokens=4),
        e2e_s=1.0,
        ttft_s=0.5,
        queue_s=0.1,
    )


@pytest.fixture
def story() -> Story:
    clock = FakeClock()
    return Story(Timelines(clock), clock)


def spent(story: Story) -> dict[str, float]:
    """What was spent where, zeros left out; checked against the total."""
    ms = dict(story.told()["spent_ms"])
    total = ms.pop("total")
    assert sum(ms.values()) == pytest.approx(total, abs=0.01)
    return {name: value for name, value in ms.items() if value}


def test_time_goes_to_admission_queue_prefill_and_decode(story: Story) -> None:
    story.accept(admission_s=0.01)
    story.place(ttft_ms=250.0, tpot_ms=20.0)
    story.output(0.3, queue_s=0.1)
    for _ in range(3):
        story.output(0.02)
    story.end()
    assert spent(story) == pytest.approx({"admission": 10, "queue": 100, "prefill": 200, "decode": 60})
    told = story.told()
    assert told["predicted"] == {"ttft_ms": 250.0, "tpot_ms": 20.0}
    assert told["seen"] == pytest.approx({"ttft_ms": 300, "tpot_ms": 20, "client_ttft_ms": 310})
    assert [e["kind"] for e in told["events"]] == ["submitted", "placed", "first output", "ended"]
    assert (told["outcome"], told["attempts"], told["state"]) == ("stop", 1, "ended")


def test_an_unusually_long_gap_is_a_stall_beyond_its_usual_pace(story: Story) -> None:
    story.accept()
    story.place()
    story.output(0.1, queue_s=0.0)
    for gap_s in (0.05, 0.05, 2.0, 0.05):
        story.output(gap_s)
    story.end()
    assert spent(story) == pytest.approx({"prefill": 100, "decode": 200, "stalls": 1950})
    assert [e["gap_ms"] for e in story.told()["events"] if e["kind"] == "stalled"] == [2000]


def test_slow_but_steady_is_no_stall(story: Story) -> None:
    story.accept()
    story.place()
    story.output(0.1, queue_s=0.0)
    for _ in range(5):
        story.output(1.5)
    story.end()
    assert "stalls" not in spent(story)


def test_a_move_takes_from_the_last_output_to_the_next_one(story: Story) -> None:
    story.accept()
    story.place("a")
    story.output(0.1, queue_s=0.0)
    story.output(0.02)
    story.clock.advance(0.3)
    story.timelines.on_instance("a", "lost", "crash", 0.3)
    story.timelines.on_moved("r1", "a", "b", "crash", 0.3, cost(120))
    story.place("b", attempt=1)
    story.output(0.7)
    story.output(0.02)
    story.end()
    assert spent(story) == pytest.approx({"prefill": 100, "decode": 40, "moves": 1000})
    told = story.told()
    assert (told["attempts"], told["instance"]) == (2, "b")
    kinds = [e["kind"] for e in told["events"]]
    assert kinds == [
        *("submitted", "placed", "first output", "instance lost", "moved", "placed", "resumed", "ended")
    ]
    moved = next(e for e in told["events"] if e["kind"] == "moved")
    assert (moved["from"], moved["to"], moved["cause"], moved["recompute_tokens"]) == ("a", "b", "crash", 120)
    assert moved["predicted_recompute_ms"] == 12.5


def test_a_hand_over_is_told_with_its_bytes_and_only_its_gap_counts_as_moving(story: Story) -> None:
    story.accept()
    story.place("p", decode="d")
    story.output(0.1, queue_s=0.0)
    story.clock.advance(0.004)
    done = HandoverRecord(
        request_id="r1",
        attempt=0,
        source="p",
        target="d",
        reason="prefill",
        mode="push",
        outcome="done",
        num_bytes=4096,
        transfer_ms=8.0,
        exposed_ms=2.0,
    )
    story.timelines.on_handover(done)
    story.place("d", attempt=1)
    story.output(0.006)
    story.timelines.on_handover(replace(done, reason="drain", outcome="failed", code="timeout"))
    story.output(0.02)
    story.end()
    assert spent(story) == pytest.approx({"prefill": 100, "moves": 10, "decode": 20})
    events = {e["kind"]: e for e in story.told()["events"]}
    assert events["placed"]["instance"] == "d"
    handed = events["handed over"]
    assert (handed["from"], handed["to"], handed["reason"], handed["mode"]) == ("p", "d", "prefill", "push")
    assert (handed["bytes"], handed["transfer_ms"], handed["exposed_ms"]) == (4096, 8.0, 2.0)
    assert events["not handed over"]["code"] == "timeout"
    assert events["resumed"]["gap_ms"] == 10.0


def test_a_move_before_the_first_output_ends_with_the_new_placement(story: Story) -> None:
    story.accept()
    story.place("a")
    story.clock.advance(0.5)
    story.place("b", attempt=1)
    story.output(0.2, queue_s=0.05)
    story.end()
    assert spent(story) == pytest.approx({"moves": 500, "queue": 50, "prefill": 150})


def test_only_the_requests_of_an_instance_hear_of_its_loss(story: Story) -> None:
    other = Story(story.timelines, story.clock, "r2", "c2")
    for each, instance in ((story, "a"), (other, "b")):
        each.accept()
        each.place(instance)
    story.timelines.on_instance("a", "lost", "x", 0.1)
    assert "instance lost" in [e["kind"] for e in story.told()["events"]]
    assert "instance lost" not in [e["kind"] for e in other.told()["events"]]


def test_a_running_request_tells_how_long_it_has_been_waiting(story: Story) -> None:
    story.accept()
    story.place()
    story.clock.advance(2.0)
    assert spent(story) == {"waiting": 2000}
    assert story.told()["state"] == "running"


def test_every_name_finds_the_request_and_a_client_id_all_of_them(story: Story) -> None:
    story.accept()
    again = Story(story.timelines, story.clock, "r2", client="c1")
    again.accept()
    for name in ("r1", "chatcmpl-r1", "cmpl-r1"):
        assert [t["id"] for t in story.timelines.find(name)] == ["r1"]
    assert [t["id"] for t in story.timelines.find("c1")] == ["r2", "r1"]
    assert story.timelines.find("nobody") == []


def test_the_ring_forgets_the_oldest_with_all_their_names() -> None:
    clock = FakeClock()
    timelines = Timelines(clock, max_ended=10)
    for i in range(50):
        one = Story(timelines, clock, f"r{i}", f"c{i % 7}")
        one.accept()
        one.place()
        one.end()
    assert timelines.num_kept == 10
    assert timelines.find("r39") == []
    assert [t["id"] for t in timelines.find("c0")] == ["r49", "r42"]
    assert sum(len(timelines.find(f"c{i}")) for i in range(7)) == 10


def test_memory_is_bounded_by_facts_whatever_a_policy_tells() -> None:
    clock = FakeClock()
    timelines = Timelines(clock, max_facts=1000)
    scores = tuple((f"engine-{i}", float(i)) for i in range(200))
    for i in range(60):
        one = Story(timelines, clock, f"r{i}", f"c{i}")
        one.accept()
        one.place("engine-199", scores=scores)
        one.end()
    assert 0 < timelines.num_kept < 60
    placed = timelines.find("r59")[0]["events"][1]
    assert len(placed["scores"]) == MAX_SCORES
    assert placed["scores_left_out"] == 200 - MAX_SCORES
    assert placed["scores"]["engine-199"] == 199.0


def test_a_request_that_moves_without_end_keeps_its_last_event(story: Story) -> None:
    story.accept()
    for attempt in range(3 * MAX_EVENTS):
        story.place(attempt=attempt)
    story.end(outcome="request_quarantined")
    told = story.told()
    assert len(told["events"]) == MAX_EVENTS + 1
    assert told["events"][-1]["kind"] == "ended"
    assert told["events_left_out"] == 2 * MAX_EVENTS + 1


STEPS = st.lists(
    st.tuples(st.sampled_from(["output", "place", "lost", "moved"]), st.floats(0, 5)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_phases_are_the_whole_whatever_happens(steps: list[tuple[str, float]], seed: int) -> None:
    clock, dice = FakeClock(), random.Random(seed)
    one = Story(Timelines(clock), clock)
    start_s = clock.monotonic_s()
    one.accept(dice.random())
    attempt, has_output = 0, False
    for what, seconds in steps:
        clock.advance(seconds)
        if what == "output":
            one.output(0.0, queue_s=None if has_output else dice.random() * 6)
            has_output = True
        elif what == "place":
            one.place(dice.choice("ab"), attempt)
            attempt += 1
        elif what == "lost":
            one.timelines.on_instance(dice.choice("ab"), "lost", "", 0.0)
        else:
            one.timelines.on_moved("r1", "a", "b", "crash", seconds, cost(1))
    one.end(dice.random())
    ms = one.told()["spent_ms"]
    assert ms["total"] == pytest.approx((clock.monotonic_s() - start_s) * 1000, abs=0.01)
    assert sum(ms[p] for p in PHASES) == pytest.approx(ms["total"], abs=0.05)
    assert all(ms[p] >= -0.001 for p in PHASES)
