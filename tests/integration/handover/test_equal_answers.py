"""A prompt computed on one engine and continued on another answers as one engine alone does: SmolLM2.

Greedy, seeded, logprobs, n = 2, stop strings and penalties; over each transport, pushed and pulled, chunked
or not, with and without prefix cache.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import Answer, bodies
from tests.faultlab.handover import first_difference, handover_lab

BODIES = bodies("smollm2", 12, 5, max_tokens=40)
COMMON = ("--max-model-len", "1024", "--num-pages", "200")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a pair is set up."""

    transfer: str = "shm"
    mode: str = "push"
    args: tuple[str, ...] = ()
    instances: str = "prefill:1,decode:1"

    def __str__(self) -> str:
        return "-".join((self.transfer, self.mode, self.instances, *self.args)).replace("--", "")


CHUNKED = ("--max-num-batched-tokens", "64")
NO_CACHE = ("--no-enable-prefix-caching",)
FEW = [Way(args=CHUNKED), Way(transfer="mooncake", mode="pull")]
ALL = [
    Way(transfer=transfer, mode=mode, args=args, instances=instances)
    for transfer in ("shm", "tcp", "mooncake")
    for mode in ("push", "pull")
    for args in ((), CHUNKED, NO_CACHE)
    for instances in ("prefill:1,decode:1", "prefill:2,decode:2")
]


@pytest.fixture(scope="module")
def wanted(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with handover_lab(tmp_path_factory.mktemp("alone"), smollm2, *COMMON, instances="mixed:1") as alone:
        return asyncio.run(golden(alone.server.base_url, BODIES))


def check(folder: Path, model: str, way: Way, wanted: list[Answer]) -> None:
    if way.transfer == "mooncake":
        pytest.importorskip("mooncake.engine")
    with handover_lab(
        folder,
        model,
        *COMMON,
        *way.args,
        instances=way.instances,
        transfer=way.transfer,
        transfer_mode=way.mode,
    ) as lab:
        got = asyncio.run(golden(lab.server.base_url, BODIES))
        assert [
            first_difference(a, b) for a, b in zip(wanted, got, strict=True) if a.content() != b.content()
        ] == []
        assert lab.ways() == {"unix" if way.transfer == "shm" else way.transfer}
        # On a busy machine one or the other transfer may time out and is computed instead.
        assert lab.num_taken() > len(BODIES) // 2, f"hardly anything was handed over: {lab.failures()}"
        lab.wait_idle()


@pytest.mark.parametrize("way", FEW, ids=str)
def test_a_pair_answers_as_one_engine_does(
    smollm2: str, tmp_path: Path, wanted: list[Answer], way: Way
) -> None:
    check(tmp_path, smollm2, way, wanted)


@pytest.mark.robustness
@pytest.mark.parametrize("way", ALL, ids=str)
def test_every_way_answers_as_one_engine_does(
    smollm2: str, tmp_path: Path, wanted: list[Answer], way: Way
) -> None:
    check(tmp_path, smollm2, way, wanted)
