"""Simulated transfers take their time, fail as they are told to, and never touch a page after Released."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from xllm.engine.kvtransfer.base import (
    Arrived,
    Asked,
    ChoiceState,
    Failed,
    Manifest,
    Offered,
    Pushed,
    Released,
    Sent,
    Slots,
)
from xllm.errors import ErrorInfo
from xllm.simulation.loop import run_virtual
from xllm.simulation.network import LinkFault, Network, Wire
from xllm.simulation.step_transfers import StepTransfers
from xllm.simulation.transfers import SimTransfers

PAGE_BYTES = 1_000_000
NUM_PAGES = 10
WIRE = Wire(latency_s=0.001, bytes_per_s=1e9)
TCP = Wire(latency_s=0.001, bytes_per_s=1e9, one_sided=False)
MANIFEST = Manifest(
    num_prompt=3,
    choices=(ChoiceState(choice=0, tokens=(1, 2, 3, 4), num_computed=3, pages=((0, 1), (0, -1))),),
)


class Process:
    """One end of the data plane, its pages, and what its step thread was told and when."""

    def __init__(self, network: Network, name: str, compatible: str = "same") -> None:
        self._loop = asyncio.get_running_loop()
        self.memory = [np.full((NUM_PAGES, 64), -1, dtype=np.int32) for _ in range(2)]
        self.told: list[tuple[float, object]] = []
        self.may_run = asyncio.Event()
        self.may_run.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()
        self.network = network
        self.transfers = SimTransfers(
            network,
            name,
            self.memory,
            page_bytes=(PAGE_BYTES, PAGE_BYTES),
            compatible=compatible,
            tell=self._tell,
            may_run=self.may_run.wait,
            spawn=self.spawn,
        )

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=name)
        self._tasks.append(task)
        return task

    def _tell(self, event: object) -> None:
        self.told.append((self._loop.time(), event))
        self._news.set()

    def heard(self, kind: type) -> list[Any]:
        return [event for _, event in self.told if isinstance(event, kind)]

    async def until(self, kind: type) -> Any:
        async with asyncio.timeout(100):
            while not self.heard(kind):
                self._news.clear()
                await self._news.wait()
        return self.heard(kind)[0]

    def kill(self) -> None:
        self.transfers.close()
        for task in self._tasks:
            task.cancel()


Scene = Callable[[Process, Process], Awaitable[None]]


def on_wire(scene: Scene, wire: Wire = WIRE, compatible: str = "same") -> None:
    async def main() -> None:
        network = Network(wire)
        p, d = Process(network, "p"), Process(network, "d", compatible)
        for group in p.memory:
            group[:] = np.arange(group.size).reshape(group.shape)
        await scene(p, d)

    run_virtual(main())


SOURCE: Slots = ((3, 4, 5), (6,))
TARGET: Slots = ((0, 1, 2), (9,))
ALL = Pushed(indices=((0, 1, 2), (0,)), pages=SOURCE)


async def hand_over(p: Process, d: Process) -> None:
    """Offer and push everything; the receiver accepts. The end is up to the test."""
    p.transfers.send("t", d.transfers.endpoints, (3, 1))
    p.transfers.push("t", ALL)
    p.transfers.finish("t", MANIFEST)
    offered = await d.until(Offered)
    assert offered.num_pages == (3, 1)
    d.transfers.accept("t", TARGET)


def equal_pages(p: Process, d: Process) -> bool:
    return all((p.memory[g][list(SOURCE[g])] == d.memory[g][list(TARGET[g])]).all() for g in range(2))


@pytest.mark.parametrize("wire", [WIRE, TCP])
def test_pages_and_the_manifest_arrive_and_take_their_time(wire: Wire) -> None:
    async def scene(p: Process, d: Process) -> None:
        begun_s = asyncio.get_running_loop().time()
        await hand_over(p, d)
        arrived = await d.until(Arrived)
        sent = await p.until(Sent)
        assert arrived.manifest == MANIFEST
        assert equal_pages(p, d)
        assert sent.num_bytes == 4 * PAGE_BYTES
        assert sent.transfer_ms == pytest.approx(4.0)
        # Offer, accept, four pages, finish.
        assert d.told[-1][0] - begun_s == pytest.approx(0.001 * 3 + 0.004)
        assert [type(e) for _, e in p.told] == [Sent, Released]
        assert [type(e) for _, e in d.told] == [Offered, Arrived, Released]

    on_wire(scene, wire)


def test_transfers_of_one_sender_share_its_bandwidth() -> None:
    async def scene(p: Process, d: Process) -> None:
        other = Process(p.network, "other")
        await asyncio.gather(hand_over(p, d), hand_over_as(p, other, "u"))
        await d.until(Arrived)
        await other.until(Arrived)
        assert max(d.told[-1][0], other.told[-1][0]) - 1000.0 == pytest.approx(0.003 + 0.008)

    async def hand_over_as(p: Process, d: Process, name: str) -> None:
        p.transfers.send(name, d.transfers.endpoints, (3, 1))
        p.transfers.push(name, ALL)
        p.transfers.finish(name, MANIFEST)
        await d.until(Offered)
        d.transfers.accept(name, TARGET)

    on_wire(scene)


def test_pages_that_a_step_writes_move_while_it_runs_and_never_before() -> None:
    async def scene(p: Process, d: Process) -> None:
        step = StepTransfers(p.transfers, may_run=p.may_run.wait, spawn=p.spawn)
        step.send("t", d.transfers.endpoints, (3, 1))
        await d.until(Offered)
        d.transfers.accept("t", TARGET)
        await asyncio.sleep(0.1)
        step.push("t", Pushed(indices=ALL.indices, pages=ALL.pages, after_layer=True))
        step.step_takes(0.3)
        await asyncio.sleep(0.09)
        assert (d.memory[0] == -1).all()
        await asyncio.sleep(0.1)
        assert (d.memory[0][[0, 1, 2]] == p.memory[0][[3, 4, 5]]).all()
        assert (d.memory[1] == -1).all()
        await asyncio.sleep(0.11)
        step.step_done()
        step.finish("t", MANIFEST)
        await d.until(Arrived)
        assert equal_pages(p, d)
        sent = await p.until(Sent)
        assert sent.exposed_ms == pytest.approx(2.0)  # finish and its answer; the pages were hidden

    on_wire(scene)


def test_a_step_that_was_stopped_loses_no_layer() -> None:
    async def scene(p: Process, d: Process) -> None:
        step = StepTransfers(p.transfers, may_run=p.may_run.wait, spawn=p.spawn)
        step.send("t", d.transfers.endpoints, (3, 1))
        await d.until(Offered)
        d.transfers.accept("t", TARGET)
        step.push("t", Pushed(indices=ALL.indices, pages=ALL.pages, after_layer=True))
        step.step_takes(0.3)
        p.may_run.clear()
        await asyncio.sleep(1.0)
        p.may_run.set()
        step.step_done()
        step.finish("t", MANIFEST)
        await d.until(Arrived)
        assert equal_pages(p, d)

    on_wire(scene)


FAILURES = [
    (LinkFault(kind="cut", fraction=fraction), "transfer_peer_gone", one_sided)
    for fraction in (0.0, 0.5, 1.0)
    for one_sided in (True, False)
] + [
    (LinkFault(kind="stall", fraction=0.5, lasts_s=5.0), "transfer_timeout", True),
    (LinkFault(kind="stall", fraction=0.0, lasts_s=5.0), "transfer_timeout", False),
    (LinkFault(kind="slow", fraction=0.5, factor=1e6), "transfer_timeout", True),
    (LinkFault(kind="corrupt", fraction=0.5), "transfer_corrupt", True),
    (LinkFault(kind="corrupt", fraction=0.0), "transfer_corrupt", False),
]


@pytest.mark.parametrize(("fault", "code", "one_sided"), FAILURES)
def test_a_fault_on_the_way_fails_and_releases_both_sides(
    fault: LinkFault, code: str, one_sided: bool
) -> None:
    async def scene(p: Process, d: Process) -> None:
        p.network.plan(fault)
        p.transfers.send("t", d.transfers.endpoints, (3, 1))
        p.transfers.push("t", ALL)
        p.transfers.finish("t", MANIFEST)
        await asyncio.sleep(0.01)
        if d.heard(Offered):
            d.transfers.accept("t", TARGET)
        await asyncio.sleep(30)
        assert p.network.num_faults_hit == 1
        last = [type(e) for _, e in p.told]
        assert last == [Failed, Released]
        codes = {e.error.code for process in (p, d) for e in process.heard(Failed)}
        assert code in codes
        if d.heard(Offered):
            assert isinstance(d.told[-1][1], Released)
        # The sender may fail after the receiver has everything: the last word was lost.
        assert not d.heard(Arrived) or fault.fraction == 1.0

    on_wire(scene, WIRE if one_sided else TCP)


def test_a_lost_last_word_leaves_the_receiver_with_everything() -> None:
    async def scene(p: Process, d: Process) -> None:
        p.network.plan(LinkFault(kind="stall_answers", fraction=1.0, lasts_s=10.0))
        await hand_over(p, d)
        await d.until(Arrived)
        failed = await p.until(Failed)
        assert failed.error.code == "transfer_timeout"
        assert equal_pages(p, d)
        assert not p.heard(Sent)

    on_wire(scene)


def test_repeated_messages_change_nothing() -> None:
    async def scene(p: Process, d: Process) -> None:
        p.network.plan(LinkFault(kind="repeat", fraction=0.25))
        await hand_over(p, d)
        await p.until(Sent)
        assert p.network.num_faults_hit == 1
        assert equal_pages(p, d)
        assert len(d.heard(Arrived)) == 1

    on_wire(scene, TCP)


@pytest.mark.parametrize("wire", [WIRE, TCP])
def test_leased_pages_stay_leased_while_a_stopped_sender_may_still_write(wire: Wire) -> None:
    async def scene(p: Process, d: Process) -> None:
        await hand_over(p, d)
        await asyncio.sleep(0.0025)
        p.may_run.clear()
        d.transfers.cancel("t")
        await asyncio.sleep(60)
        assert bool(d.heard(Released)) is not wire.one_sided
        before = [group.copy() for group in d.memory]
        p.may_run.set()
        await asyncio.sleep(1)
        assert isinstance(d.told[-1][1], Released)
        assert [type(e) for _, e in p.told] == [Failed, Released]
        written = any((a != b).any() for a, b in zip(before, d.memory, strict=True))
        # That the zombie wrote is the point; where it cannot, the pages were free at once.
        assert written is wire.one_sided

    on_wire(scene, wire)


@pytest.mark.parametrize("who", ["p", "d"])
def test_a_killed_peer_fails_the_other_side(who: str) -> None:
    async def scene(p: Process, d: Process) -> None:
        await hand_over(p, d)
        await asyncio.sleep(0.0025)
        victim, other = (p, d) if who == "p" else (d, p)
        victim.kill()
        failed = await other.until(Failed)
        assert failed.error.code == "transfer_peer_gone"
        assert isinstance(other.told[-1][1], Released)

    on_wire(scene)


def test_a_partition_is_silence_for_both() -> None:
    async def scene(p: Process, d: Process) -> None:
        p.transfers.send("t", d.transfers.endpoints, (3, 1))
        await d.until(Offered)
        d.transfers.accept("t", TARGET)
        p.network.part("p", "d", 10.0)
        parted_s = asyncio.get_running_loop().time()
        await p.until(Failed)
        await d.until(Failed)
        assert all(p_or_d.told[-1][0] - parted_s < 3.0 for p_or_d in (p,))
        assert not d.heard(Released)  # the sender may still be writing
        await d.until(Released)

    on_wire(scene)


def test_what_cannot_be_reached_or_does_not_fit_is_refused_by_name() -> None:
    async def unreachable(p: Process, d: Process) -> None:
        p.transfers.send("t", ("nobody",), (1, 0))
        assert (await p.until(Failed)).error.code == "transfer_unreachable"
        assert p.heard(Released)

    async def incompatible(p: Process, d: Process) -> None:
        p.transfers.send("t", ("nobody", "d"), (1, 0))
        assert (await p.until(Failed)).error.code == "transfer_incompatible"
        assert not d.told

    async def refused(p: Process, d: Process) -> None:
        p.transfers.send("t", ("d",), (1, 0))
        await d.until(Offered)
        d.transfers.refuse("t", ErrorInfo(kind="CapacityError", code="no_pages", message="full"))
        assert (await p.until(Failed)).error.code == "no_pages"
        assert p.heard(Released)
        assert d.heard(Released)

    on_wire(unreachable)
    on_wire(incompatible, compatible="other")
    on_wire(refused)


def test_pages_are_pulled_from_who_keeps_them() -> None:
    async def scene(p: Process, d: Process) -> None:
        d.transfers.pull("t", ("p",), root=b"r", digests=(b"a", b"b"))
        asked = await p.until(Asked)
        assert (asked.root, asked.digests) == (b"r", (b"a", b"b"))
        p.transfers.give("t", ALL, MANIFEST)
        await d.until(Offered)
        d.transfers.accept("t", TARGET)
        assert (await d.until(Arrived)).manifest == MANIFEST
        assert equal_pages(p, d)
        d.transfers.pull("u", ("p",))
        await asyncio.sleep(0.01)
        p.transfers.refuse("u", ErrorInfo(kind="NotFoundError", code="gone", message="not here"))
        assert (await d.until(Failed)).error.code == "gone"

    on_wire(scene)
