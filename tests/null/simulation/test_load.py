"""Load on simulated instances with roles: prompts here, decoding there, and what clients see of it."""

from __future__ import annotations

import asyncio
import random

from xllm.config import FrontConfig, SchedulerConfig
from xllm.cost import StepCost
from xllm.service.handover.record import HandoverRecord
from xllm.service.snapshot import NullObserver
from xllm.simulation.cluster import EngineShape, SimCluster
from xllm.simulation.load import LoadPhase, Served, draw_load, serve_load
from xllm.simulation.loop import run_virtual
from xllm.simulation.network import Wire
from xllm.types import SLO, Phase

STEP = StepCost((10.0, 0.05, 0.0, 0.05, 0.0))
CHUNK = 1024
PREFILL_STEP_S = (10.0 + 0.05 * CHUNK) / 1000
PHASES = (LoadPhase(name="prompts", lasts_s=4.0, rate=6.0, prompt_len=1400, output_len=40),)


class Records(NullObserver):
    def __init__(self) -> None:
        self.all: list[HandoverRecord] = []
        self.switches: list[tuple[str, str, str]] = []

    def on_handover(self, record: HandoverRecord) -> None:
        self.all.append(record)

    def on_role(self, name: str, old: str, new: str, reason: str, numbers: str) -> None:
        self.switches.append((name, old, new))


def serve(
    roles: tuple[tuple[Phase, ...], ...],
    records: Records,
    *,
    phases: tuple[LoadPhase, ...] = PHASES,
    config: FrontConfig | None = None,
    step: StepCost = STEP,
) -> list[Served]:
    async def main() -> list[Served]:
        shape = EngineShape(
            num_pages=2048,
            scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=CHUNK),
            step_time=step,
            max_model_len=4096,
            page_bytes=4_000_000,
            exact=False,
        )
        wire = Wire(bytes_per_s=10e9)
        cluster = SimCluster(
            config or FrontConfig(max_queue_delay_s=0.0),
            shape,
            rng=random.Random(1),
            observer=records,
            wire=wire,
        )
        for i, role in enumerate(roles):
            cluster.phases[f"e{i}"] = role
            await cluster.add(f"e{i}")
        await asyncio.sleep(1.0)
        requests = draw_load(phases, random.Random(2), max_prompt_len=3000, max_output_len=400)
        served = await serve_load(cluster.front, requests, SLO())
        await cluster.close()
        return served

    return run_virtual(main())


def test_pages_move_while_prompts_are_computed_and_streams_go_on_elsewhere() -> None:
    records = Records()
    served = serve((("prefill",), ("decode",)), records)
    assert len(served) > 15
    assert all(s.ended for s in served)
    done = [r for r in records.all if r.outcome == "done"]
    assert len(done) == len(served)
    hidden = sorted(r.hidden_share or 0.0 for r in done)
    assert hidden[len(hidden) // 2] > 0.8


def test_the_answer_to_a_move_waits_for_one_step_of_others_prompts_at_most() -> None:
    """The last page crosses during the next step; its end and a step of the decoder are what clients see."""
    served = serve((("prefill",), ("decode",)), Records())
    decode_step_s = (10.0 + 0.05 * len(served)) / 1000
    waits = sorted(s.second_s for s in served)
    assert waits[-1] < PREFILL_STEP_S + 3 * decode_step_s


def test_roles_follow_a_load_that_shifts() -> None:
    slow = StepCost((50.0, 0.25, 0.0, 0.25, 0.0))
    phases = (
        LoadPhase(name="prompts", lasts_s=10.0, rate=5.0, prompt_len=1400, output_len=10, spread=0.2),
        LoadPhase(name="decoding", lasts_s=12.0, rate=28.0, prompt_len=60, output_len=100, spread=0.2),
    )
    config = FrontConfig(
        max_queue_delay_s=0.0,
        max_kv_oversubscription=1000.0,
        role_control="adaptive",
        slo_ttft_ms=2000.0,
        slo_tpot_ms=80.0,
        router_policy="least-load",
    )
    split: tuple[tuple[Phase, ...], ...] = (("prefill",), ("prefill",), ("decode",), ("decode",))
    records = Records()
    served = serve(split, records, phases=phases, config=config, step=slow)
    assert all(s.ended for s in served)
    # How much that is worth is the benchmark's question; here it must happen, and must not go to and fro.
    assert 1 <= len(records.switches) <= 12
