"""In which pieces a transfer goes beside the steps that write and slow down for it, and how much it rests."""

from __future__ import annotations

import numpy as np
import pytest

from xllm.engine.kvtransfer.base import Manifest, Pushed
from xllm.engine.kvtransfer.memory import KVMemory, of_layers
from xllm.engine.kvtransfer.messages import Accept, Way
from xllm.engine.kvtransfer.outgoing import Outgoing, Part, Step
from xllm.engine.kvtransfer.pacing import HURRY_S, REST, Pacer
from xllm.types import KVGroup, KVLayout

NUM_LAYERS, NUM_PAGES = 30, 16
PIECE = 24 << 10
"""Of a layer's keys, as in SmolLM2-135M."""


def memory() -> KVMemory:
    group = KVGroup(kind="full", layers=tuple(range(NUM_LAYERS)), num_kv_heads=3, head_dim=64)
    pages = np.zeros((NUM_PAGES, 2 * NUM_LAYERS * PIECE), np.uint8)
    return of_layers(KVLayout(groups=(group,), dtype="bfloat16"), [pages])


def written(way: Way) -> tuple[list[Part], list[int]]:
    """Every piece in order, and after which layer each was due; NUM_LAYERS + 1 = after the step."""
    out = Outgoing("t", memory(), (NUM_PAGES,))
    pages = tuple(range(NUM_PAGES))
    out.accepted, out.step = Accept(transfer_id="t", slots=(pages,), way=way), Step.ACCEPTED
    out.push(Pushed(indices=(pages,), pages=(pages,), after_layer=True))
    parts: list[Part] = []
    when: list[int] = []

    def work(now: int) -> None:
        while out.has_jobs:
            out.work(lambda _, part, slots: parts.append(part), lambda message: None)
        when.extend([now] * (len(parts) - len(when)))

    for layer in range(1, NUM_LAYERS):
        out.layers_done(layer)
        work(layer)
    out.step_done(True)
    out.finish(Manifest(num_prompt=0), 0.0)
    work(NUM_LAYERS + 1)
    return parts, when


@pytest.mark.parametrize("way", ["shm", "stream", "mooncake"])
def test_every_byte_goes_once_and_most_of_them_before_the_step_ends(way: Way) -> None:
    parts, when = written(way)
    seen = np.zeros((NUM_PAGES, 2 * NUM_LAYERS * PIECE), np.uint8)
    for part in parts:
        for page in part.pages:
            seen[page, part.offset : part.offset + part.length] += 1
    assert (seen == 1).all()
    late = sum(p.num_bytes for p, at in zip(parts, when, strict=True) if at > NUM_LAYERS)
    assert late / seen.size <= (4 if way == "mooncake" else 1) / NUM_LAYERS


def test_mooncake_gets_few_writes() -> None:
    """One for each page and stretch: with every layer by itself there would be 960."""
    parts, _ = written("mooncake")
    assert sum(len(part.pages) for part in parts) <= 160


def test_copies_rest_in_proportion_to_their_work() -> None:
    pacer, now_s, worked_s = Pacer(), 0.0, 0.0
    for _ in range(1000):
        now_s += pacer.rest_s(now_s) + 0.0003
        worked_s += 0.0003
        pacer.worked(0.0003, now_s, age_s=0.0, num_transfers=1)
    assert now_s == pytest.approx((1 + REST) * worked_s, rel=0.02)


def test_the_rest_is_shorter_for_several_transfers_and_for_an_old_one() -> None:
    def rest_s(**of: float) -> float:
        pacer = Pacer()
        pacer.worked(0.01, 0.0, **of)  # type: ignore[arg-type]
        return pacer.rest_s(0.0)

    assert rest_s(age_s=0.0, num_transfers=4) == pytest.approx(rest_s(age_s=0.0, num_transfers=1) / 4)
    assert rest_s(age_s=HURRY_S / 2, num_transfers=1) == pytest.approx(rest_s(age_s=0.0, num_transfers=1) / 2)
    assert rest_s(age_s=2 * HURRY_S, num_transfers=1) == 0.0
