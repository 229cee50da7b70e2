"""Either side of a hand-over dies, or stands still and comes back, in each of its phases (F1, F2, F12, F16).

Real processes on the null device, whose tokens are hashes of all KV that a row sees. Every stream, also those
of other requests, must be what one engine alone answers; afterwards no page is owned, leased or pinned. A few
cases here; all of them, over every transport, in `make robustness`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer, bodies
from tests.faultlab.handover import Fault, HandoverLab, handover_lab
from tests.faultlab.lab import MODEL, flags

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
PACE_MS = 2.0
BODIES = bodies(MODEL, 9, 3, max_tokens=50)
POINTS = {
    "p.move": (0,),
    "p.chunk": (0, 1, 2),
    "p.finish": (0,),
    "p.finished": (0,),
    "p.sent": (0,),
    "p.answered": (0,),
    "d.offered": (0,),
    "d.accepted": (0,),
    "d.arrived": (0,),
    "d.submitted": (0,),
    "d.step": (0, 1, 17),
    "d.last": (0,),
}
"""Of every failpoint the passes that are let go by before it strikes."""
FEW = [
    Fault(point="p.chunk", skip=2),
    Fault(point="p.chunk", skip=1, number=STOP),
    Fault(point="p.finished"),
    Fault(point="d.arrived"),
    Fault(point="d.step", skip=5),
    Fault(point="d.last"),
    Fault(point="d.submitted", number=STOP),
]
ALL = [
    Fault(point=point, number=number, skip=skip)
    for number in (KILL, STOP)
    for point, skips in POINTS.items()
    for skip in skips
]


def flags_of(folder: Path) -> tuple[str, ...]:
    """Prompts take several steps here, so that a hand-over can begin in the middle of one."""
    return *flags(folder), "--logits-processors", "handoverlab", "--max-num-batched-tokens", "256"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    folder = tmp_path_factory.mktemp("alone")
    with handover_lab(folder, *flags_of(folder), instances="mixed:1") as alone:
        return asyncio.run(golden(alone.server.base_url, BODIES))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandoverLab]:
    folder = tmp_path_factory.mktemp("pair")
    with handover_lab(folder, *flags_of(folder), pace_ms=PACE_MS) as made:
        yield made


@pytest.fixture(
    scope="module",
    params=[
        (transport, mode, instances)
        for transport, mode in (("shm", "push"), ("tcp", "push"), ("tcp", "pull"))
        for instances in ("prefill:1,decode:1", "prefill:2,decode:2")
    ],
    ids=lambda param: "-".join(param).replace(",", "+").replace(":", ""),
)
def each_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HandoverLab]:
    transport, mode, instances = request.param
    folder = tmp_path_factory.mktemp("pair")
    with handover_lab(
        folder,
        *flags_of(folder),
        instances=instances,
        pace_ms=PACE_MS,
        transfer=transport,
        transfer_mode=mode,
    ) as made:
        yield made


REAL = (
    "--max-model-len", "1024", "--num-pages", "200", "--logits-processors", "handoverlab",
    "--max-num-batched-tokens", "64",
)  # fmt: skip
REAL_BODIES = bodies("smollm2", 8, 4, max_tokens=40)
REAL_FAULTS = [
    *(
        Fault(point=point, number=number, skip=skip, after_ms=after_ms)
        for number in (KILL, STOP)
        for point, skip, after_ms in (
            ("p.chunk", 1, 0.0),
            ("p.chunk", 3, 20.0),
            ("p.finished", 0, 0.3),
            ("p.answered", 0, 0.0),
            ("d.accepted", 0, 3.0),
            ("d.arrived", 2, 0.0),
            ("d.step", 4, 0.0),
        )
    )
]
"""With pages of megabytes, read layer by layer while the step writes them."""


@pytest.fixture(scope="module")
def real_wanted(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    folder = tmp_path_factory.mktemp("alone")
    with handover_lab(folder, smollm2, *REAL, instances="mixed:1") as alone:
        return asyncio.run(golden(alone.server.base_url, REAL_BODIES))


@pytest.fixture(scope="module", params=["shm", "tcp", "mooncake"])
def real_pair(
    request: pytest.FixtureRequest, smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HandoverLab]:
    """Mooncake here only: for the null device's pages of 256 bytes it is rightly found too slow."""
    if request.param == "mooncake":
        pytest.importorskip("mooncake.engine")
    folder = tmp_path_factory.mktemp("pair")
    with handover_lab(folder, smollm2, *REAL, transfer=request.param) as made:
        yield made


def check(lab: HandoverLab, fault: Fault, wanted: list[Answer], asked: list[dict[str, Any]] = BODIES) -> None:
    struck = asyncio.run(lab.under(fault, asked))
    assert struck.differences(wanted) == []
    assert lab.server.count("xllm:divergences_total") == 0
    lab.wait_works_again(asked[:2], wanted[:2])


@pytest.mark.parametrize("fault", FEW, ids=str)
def test_no_stream_notices(pair: HandoverLab, wanted: list[Answer], fault: Fault) -> None:
    check(pair, fault, wanted)


@pytest.mark.robustness
@pytest.mark.parametrize("fault", ALL, ids=str)
def test_no_stream_notices_over_any_transport(
    each_pair: HandoverLab, wanted: list[Answer], fault: Fault
) -> None:
    check(each_pair, fault, wanted)


@pytest.mark.robustness
@pytest.mark.parametrize("fault", REAL_FAULTS, ids=str)
def test_no_stream_of_the_real_model_notices(
    real_pair: HandoverLab, real_wanted: list[Answer], fault: Fault
) -> None:
    check(real_pair, fault, real_wanted, REAL_BODIES)
