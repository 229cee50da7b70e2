"""What lies between two engines cuts, resets, swallows, slows or flips bits (F16 to F19, F21). Over tcp.

A lost transfer is no error of the client: the receiver computes what it lacks. Each test looks first whether
its fault met a transfer, and last whether pages were given back and hand-overs work again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer
from tests.faultlab.handover import HandoverLab, Struck, answer_of, handover_lab, wait_for
from tests.faultlab.tcpproxy import Toxics
from tests.integration.handover.test_death_of_a_side import BODIES, flags_of

TRANSFERRED = "xllm:kv_transfer_bytes_total"
FAILED = "xllm:kv_transfer_failures_total"


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandoverLab]:
    folder = tmp_path_factory.mktemp("linked")
    with handover_lab(folder, *flags_of(folder), pace_ms=2, proxied=True, transfer="tcp") as made:
        yield made


@pytest.fixture(scope="module")
def wanted(linked: HandoverLab) -> list[Answer]:
    """Over links that are as they should be; they carry the pages."""
    answers = asyncio.run(golden(linked.server.base_url, BODIES))
    assert linked.server.count(TRANSFERRED) > 0
    assert sum(p.counts["connections"] for p in linked.proxies) > 0, "no transfer went through a proxy"
    return answers


async def under(lab: HandoverLab, toxics: Toxics) -> Struck:
    for proxy in lab.proxies:
        proxy.set(toxics)
    try:
        async with lab.client() as http:
            return Struck(pid=0, answers=list(await asyncio.gather(*(answer_of(http, b) for b in BODIES))))
    finally:
        lab.restore()


def works_again(lab: HandoverLab, wanted: list[Answer]) -> None:
    """Pages are given back, and the next requests are handed over."""
    lab.wait_idle()
    before = lab.server.count(TRANSFERRED)

    def again() -> bool:
        got = asyncio.run(golden(lab.server.base_url, BODIES[:4]))
        assert [a.content() for a in got] == [a.content() for a in wanted[:4]]
        return lab.server.count(TRANSFERRED) > before

    wait_for(again, "hand-overs work again")


@pytest.mark.parametrize(
    "toxics",
    [
        Toxics(refuse=True),
        pytest.param(Toxics(blackhole=True), marks=pytest.mark.robustness),
        Toxics(blackhole=True, way="down"),
        Toxics(corrupt_after=1500, way="up"),
        pytest.param(Toxics(corrupt_after=600, way="down"), marks=pytest.mark.robustness),
        pytest.param(Toxics(bandwidth_bytes_s=8000), marks=pytest.mark.robustness),
        pytest.param(Toxics(bandwidth_bytes_s=800), marks=pytest.mark.robustness),
        pytest.param(Toxics(latency_s=0.3), marks=pytest.mark.robustness),
    ],
    ids=["refused", "swallowed", "half_open", "bit_up", "bit_down", "slow", "very_slow", "far"],
)
def test_a_bad_link_costs_time_only(linked: HandoverLab, wanted: list[Answer], toxics: Toxics) -> None:
    # Connections are kept, so that some faults would not meet one that is open.
    for proxy in linked.proxies:
        proxy.cut()
    before = linked.server.count(FAILED)
    struck = asyncio.run(under(linked, toxics))
    assert struck.differences(wanted) == []
    harmless = toxics.latency_s or toxics.bandwidth_bytes_s
    assert harmless or linked.server.count(FAILED) > before, "the fault met no transfer"
    works_again(linked, wanted)


@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
def test_a_link_that_is_cut_all_the_time_costs_time_only(
    linked: HandoverLab, wanted: list[Answer], reset: bool
) -> None:
    async def cutting() -> Struck:
        async with linked.client() as http:
            asked = [asyncio.create_task(answer_of(http, body)) for body in BODIES]
            while not all(task.done() for task in asked):
                for proxy in linked.proxies:
                    cut[0] += await asyncio.to_thread(proxy.cut, reset=reset)
                await asyncio.sleep(0.01)
            return Struck(pid=0, answers=[task.result() for task in asked])

    cut = [0]
    struck = asyncio.run(cutting())
    assert struck.differences(wanted) == []
    assert cut[0] > 0, "no connection was cut"
    works_again(linked, wanted)
