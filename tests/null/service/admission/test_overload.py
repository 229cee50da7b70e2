"""Admission against engines in virtual time: ten times too much work, then not; and tenants that compete."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.null.service.admission.queueing import Queueing
from xllm.config import FrontConfig


@dataclass(frozen=True, slots=True)
class Case:
    """Engines, how long they are overloaded, and how long the middle request may wait meanwhile."""

    servers: int = 1
    slots: int = 16
    service_s: float = 2.0
    overload_s: float = 40.0
    most_s: float = 8.0


CASES = {
    "one engine": Case(),
    "three engines": Case(servers=3, slots=8),
    "short work": Case(service_s=0.5, overload_s=20.0),
    "long work": Case(slots=4, service_s=20.0, overload_s=400.0, most_s=15.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("warm", [False, True])
def test_ten_times_too_much_keeps_engines_busy_and_queues_short(name: str, warm: bool) -> None:
    case = CASES[name]
    config = FrontConfig(max_queue_delay_s=5.0)
    model = Queueing(config, servers=case.servers, slots=case.slots, service_s=case.service_s)
    capacity = model.capacity_per_s
    if warm:
        model.run(20 * case.service_s, {"": 0.7 * capacity})
        assert len(model.refusals) <= 0.05 * len(model.outcomes) + 2
    begin_s = model.now_s
    model.run(case.overload_s, {"": 10 * capacity})
    end_s = model.now_s
    assert len(model.refusals) > 5 * capacity * case.overload_s  # it was an overload
    model.run(30.0, {"": 0.6 * capacity})
    # From a cold start the first answers end one service time late.
    from_s = begin_s if warm else begin_s + case.service_s
    assert model.num_ended(from_s, end_s) >= 0.9 * capacity * (end_s - from_s)
    waits = model.waits_s(begin_s + case.overload_s / 2, end_s)
    assert waits[len(waits) // 2] <= case.most_s
    after = model.waits_s(end_s + 10, model.now_s)
    assert not after or after[int(0.9 * len(after))] <= 1.0 + case.service_s / 2


def test_a_tenant_alone_may_have_everything_and_competitors_get_equal_parts() -> None:
    model = Queueing(FrontConfig())
    capacity = model.capacity_per_s

    def parts(seconds: float, **rates: float) -> dict[str, float]:
        """Parts of the capacity that each tenant gets, once things have settled."""
        model.run(20, {t: r * capacity for t, r in rates.items()})
        since_s = model.now_s
        model.run(seconds, {t: r * capacity for t, r in rates.items()})
        return {t: model.num_ended(since_s, model.now_s, t) / seconds / capacity for t in rates}

    assert parts(20, a=10)["a"] > 0.9
    modest = parts(40, a=10, b=0.3)
    assert modest["b"] == pytest.approx(0.3, abs=0.08)
    assert sum(modest.values()) > 0.9
    equal = parts(40, a=10, b=3)
    assert equal["a"] == pytest.approx(0.5, abs=0.1)
    assert equal["b"] == pytest.approx(0.5, abs=0.1)
    three = parts(60, a=10, b=3, c=1)
    assert all(part == pytest.approx(1 / 3, abs=0.1) for part in three.values())
    assert parts(20, a=10)["a"] > 0.9
