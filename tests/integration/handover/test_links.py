"""What lies between two engines cuts, resets, swallows, slows, flips bits or repeats (F16 to F19, F21, F22).

A lost transfer is no error of the client: the receiver computes what it lacks. Each test looks first whether
its fault met a transfer, and last whether pages were given back and hand-overs work again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer
from tests.faultlab.handover import HandoverLab, Struck, answer_of, handover_lab, uncached
from tests.faultlab.tcpproxy import Toxics
from tests.integration.handover.test_death_of_a_side import BODIES, flags_of


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandoverLab]:
    folder = tmp_path_factory.mktemp("linked")
    with handover_lab(folder, *flags_of(folder), pace_ms=2, proxied=True, transfer="tcp") as made:
        yield made


@pytest.fixture(scope="module")
def wanted(linked: HandoverLab) -> list[Answer]:
    """Over links that are as they should be; they carry the pages."""
    answers = asyncio.run(golden(linked.server.base_url, BODIES))
    assert linked.num_taken() > 0
    assert sum(p.counts["connections"] for p in linked.proxies) > 0, "no transfer went through a proxy"
    return answers


async def under(lab: HandoverLab, toxics: Toxics) -> Struck:
    for proxy in lab.proxies:
        proxy.set(toxics)
    try:
        async with lab.client() as http:
            return Struck(
                pid=0, answers=list(await asyncio.gather(*(answer_of(http, b) for b in uncached(BODIES))))
            )
    finally:
        lab.restore()


@pytest.mark.parametrize(
    ("toxics", "done"),
    [
        pytest.param(Toxics(refuse=True), "refused", id="refused", marks=pytest.mark.robustness),
        pytest.param(Toxics(blackhole=True), "held", id="swallowed", marks=pytest.mark.robustness),
        pytest.param(Toxics(blackhole=True, way="down"), "held", id="half_open"),
        pytest.param(Toxics(corrupt_after=1500, way="up"), "corrupted", id="bit_up"),
        pytest.param(
            Toxics(corrupt_after=600, way="down"), "corrupted", id="bit_down", marks=pytest.mark.robustness
        ),
    ],
)
def test_a_broken_link_costs_time_only(
    linked: HandoverLab, wanted: list[Answer], toxics: Toxics, done: str
) -> None:
    # Connections are kept, so that some faults would not meet one that is open.
    for proxy in linked.proxies:
        proxy.cut()
    num_done, failures = num_of(linked, done), linked.failures()
    struck = asyncio.run(under(linked, toxics))
    assert num_of(linked, done) > num_done, "the fault did not happen"
    assert linked.failures() != failures, "no transfer failed of it, or nobody counted"
    assert struck.differences(wanted) == []
    linked.wait_works_again(BODIES[:4], wanted[:4])


def test_messages_that_come_twice_change_nothing(linked: HandoverLab, wanted: list[Answer]) -> None:
    for proxy in linked.proxies:
        proxy.cut()
    num_done, num_taken = num_of(linked, "repeated"), linked.num_taken()
    struck = asyncio.run(under(linked, Toxics(repeat=True)))
    assert num_of(linked, "repeated") > num_done, "the fault did not happen"
    assert linked.num_taken() > num_taken, "nothing was handed over for it"
    assert struck.differences(wanted) == []
    for proxy in linked.proxies:
        proxy.cut()
    linked.wait_works_again(BODIES[:4], wanted[:4])


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("toxics", "done"),
    [
        pytest.param(Toxics(bandwidth_bytes_s=8000), "slowed", id="slow"),
        pytest.param(Toxics(bandwidth_bytes_s=800), "slowed", id="very_slow"),
        pytest.param(Toxics(latency_s=0.3), "", id="far"),
    ],
)
def test_a_slow_link_costs_time_only(
    linked: HandoverLab, wanted: list[Answer], toxics: Toxics, done: str
) -> None:
    num_done = num_of(linked, done)
    struck = asyncio.run(under(linked, toxics))
    assert not done or num_of(linked, done) > num_done, "the fault did not happen"
    assert struck.differences(wanted) == []
    linked.wait_works_again(BODIES[:4], wanted[:4])


def num_of(lab: HandoverLab, done: str) -> int:
    """How often the proxies have done that."""
    return sum(proxy.counts[done] for proxy in lab.proxies)


@pytest.mark.parametrize(
    "reset", [pytest.param(False, id="cut", marks=pytest.mark.robustness), pytest.param(True, id="reset")]
)
def test_a_link_that_is_cut_all_the_time_costs_time_only(
    linked: HandoverLab, wanted: list[Answer], reset: bool
) -> None:
    async def cutting() -> Struck:
        async with linked.client() as http:
            asked = [asyncio.create_task(answer_of(http, body)) for body in uncached(BODIES)]
            while not all(task.done() for task in asked):
                for proxy in linked.proxies:
                    cut[0] += await asyncio.to_thread(proxy.cut, reset=reset)
                await asyncio.sleep(0.01)
            return Struck(pid=0, answers=[task.result() for task in asked])

    cut = [0]
    struck = asyncio.run(cutting())
    assert struck.differences(wanted) == []
    assert cut[0] > 0, "no connection was cut"
    linked.wait_works_again(BODIES[:4], wanted[:4])
