"""Who is suspected, when, and how a suspicion ends."""

from __future__ import annotations

import pytest

from xllm.service.failover.detector import LONGEST_LIMIT_S, Detector, DetectorLimits, Finding
from xllm.wire.messages import Pulse

LIMITS = DetectorLimits(floor_s=2.0, factor=5.0, kill_s=10.0)
TICK_S = 0.2


class Watch:
    """A detector that is ticked on time; `found` collects (when, kind, reason)."""

    def __init__(self, *, pulses: bool = False) -> None:
        self.detector = Detector(LIMITS, TICK_S)
        self.now_s = 100.0
        self.found: list[tuple[float, str, str]] = []
        self.detector.add("a", self.now_s, pulses=pulses)
        self.pass_time(0.0)

    def pulse(
        self, step: int, *, layer: int = 0, busy: bool = True, age: float = 0, predicted: float = 1.0
    ) -> None:
        pulse = Pulse(step=step, layer=layer, busy=busy, step_age_ms=age, predicted_ms=predicted)
        self.detector.pulse("a", self.now_s, pulse)

    def pass_time(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while True:
            self.found += [(round(self.now_s - 100.0, 3), f.kind, f.reason) for f in self.tick()]
            if self.now_s >= end_s:
                return
            self.now_s = min(end_s, self.now_s + TICK_S)

    def tick(self) -> tuple[Finding, ...]:
        return self.detector.tick(self.now_s)


def kinds(watch: Watch) -> list[str]:
    return [kind for _, kind, _ in watch.found]


def test_a_peer_that_never_pulsed_is_never_suspected() -> None:
    watch = Watch()
    watch.detector.heard("a", watch.now_s)
    watch.pass_time(3600.0)
    assert watch.found == []


def test_silence_counts_from_the_first_pulse_and_at_once_for_a_peer_known_to_pulse() -> None:
    for watch in (Watch(pulses=True), Watch()):
        watch.pulse(1, busy=False)
        watch.pass_time(1.9)
        assert watch.found == []
        watch.pass_time(0.5)
        assert [(k, r) for _, k, r in watch.found] == [("suspect", "silent")]
    watch = Watch(pulses=True)
    watch.pass_time(2.5)
    assert kinds(watch) == ["suspect"]


def test_any_message_breaks_the_silence() -> None:
    watch = Watch(pulses=True)
    for _ in range(20):
        watch.pass_time(1.5)
        watch.detector.heard("a", watch.now_s)
    assert watch.found == []


def test_busy_without_progress_is_suspected_though_it_pulses() -> None:
    watch = Watch()
    for _ in range(5):
        watch.pulse(7, layer=3)
        watch.pass_time(0.5)
    assert [(k, r) for _, k, r in watch.found] == [("suspect", "stuck")]
    when = watch.found[0][0]
    assert 2.0 < when <= 2.0 + 2 * TICK_S


@pytest.mark.parametrize("moving", ["step", "layer", "output", "idle"])
def test_every_sort_of_progress_counts(moving: str) -> None:
    watch = Watch()
    for i in range(40):
        if moving == "output":
            watch.detector.progress("a", watch.now_s)
        watch.pulse(i if moving == "step" else 7, layer=i if moving == "layer" else 3, busy=moving != "idle")
        watch.pass_time(0.5)
    assert watch.found == []


@pytest.mark.parametrize("layers", [True, False])
def test_a_long_step_is_given_five_times_its_predicted_rest(layers: bool) -> None:
    watch = Watch()
    for i in range(100):
        watch.pulse(7, layer=1 if layers else 0, age=i * 500.0, predicted=3000.0)
        watch.pass_time(0.5)
    when, kind, reason = watch.found[0]
    assert (kind, reason) == ("suspect", "stuck")
    assert 15.0 < when <= 15.0 + 2 * TICK_S


def test_silence_in_a_long_step_is_given_its_predicted_rest_too() -> None:
    watch = Watch()
    watch.pulse(7, age=1000.0, predicted=3000.0)
    watch.pass_time(30.0)
    when, kind, reason = watch.found[0]
    assert (kind, reason) == ("suspect", "silent")
    assert 10.0 <= when <= 10.0 + 2 * TICK_S


def test_a_step_of_which_nothing_is_known_is_given_more_time() -> None:
    watch = Watch()
    for _ in range(30):
        watch.pulse(7, layer=3, predicted=0.0)
        watch.pass_time(0.5)
    assert 10.0 < watch.found[0][0] <= 10.0 + 2 * TICK_S


@pytest.mark.parametrize("predicted", [float("inf"), float("nan"), -5.0, 1e12])
def test_a_wild_prediction_does_not_switch_detection_off(predicted: float) -> None:
    watch = Watch()
    for _ in range(int(LONGEST_LIMIT_S * 2) + 10):
        watch.pulse(7, layer=1, predicted=predicted)
        watch.pass_time(0.5)
    assert kinds(watch)[0] == "suspect"


def test_progress_ends_a_suspicion() -> None:
    watch = Watch()
    watch.pulse(7, layer=1)
    watch.pass_time(3.0)
    assert watch.detector.is_suspect("a")
    watch.pulse(8)
    watch.pass_time(0.2)
    assert kinds(watch) == ["suspect", "ready"]
    assert not watch.detector.is_suspect("a")


def test_a_pulse_without_progress_does_not_end_the_suspicion_of_a_stuck_one() -> None:
    watch = Watch()
    for _ in range(12):
        watch.pulse(7, layer=1)
        watch.pass_time(0.5)
    assert kinds(watch) == ["suspect"]


def test_a_lasting_suspicion_is_told_once_more() -> None:
    watch = Watch(pulses=True)
    watch.pass_time(60.0)
    assert kinds(watch) == ["suspect", "hung"]
    assert 12.0 <= watch.found[1][0] <= 12.0 + 3 * TICK_S


def test_a_front_that_stood_still_suspects_nobody() -> None:
    watch = Watch(pulses=True)
    watch.pulse(1)
    watch.now_s += 30.0
    assert watch.tick() == ()
    watch.pass_time(1.5)
    assert watch.found == []
    watch.pass_time(1.0)
    assert kinds(watch) == ["suspect"]


def test_standing_still_does_not_clear_a_suspicion() -> None:
    watch = Watch(pulses=True)
    watch.pass_time(3.0)
    watch.now_s += 5.0
    watch.tick()
    assert watch.detector.is_suspect("a")


def test_a_name_that_comes_back_starts_anew() -> None:
    watch = Watch(pulses=True)
    watch.pass_time(3.0)
    watch.detector.remove("a")
    watch.detector.add("a", watch.now_s)
    assert not watch.detector.is_suspect("a")
    watch.pass_time(30.0)
    assert kinds(watch) == ["suspect"]


def test_strangers_are_ignored() -> None:
    detector = Detector(LIMITS, TICK_S)
    detector.heard("x", 1.0)
    detector.progress("x", 1.0)
    detector.pulse("x", 1.0, Pulse(step=1))
    detector.remove("x")
    assert detector.tick(2.0) == ()
    assert detector.quiet_s("x", 2.0) == 0.0
