"""Promise 1, for every platform: the logits behind every token are the same bits on every path.

SmolLM2-135M. Each run keeps a digest of the full float32 logits row behind each drawn token; runs are
compared bit for bit, not within a tolerance. A platform's test module imports these tests and brings
the fixture `built`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from xllm.clock import SystemClock
from xllm.config import CacheConfig, EngineConfig, ModelConfig, PlatformConfig, SchedulerConfig
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.core import EngineCore
from xllm.engine.executor import InProcExecutor
from xllm.engine.memory.manager import PageManager
from xllm.engine.scheduler.order import create_order
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.testing.null_engine import outputs, spec
from xllm.testing.terminal import assert_terminal
from xllm.types import RequestSpec
from xllm.wire.messages import Frame

NUM_PAGES = 160
MAX_TOKENS = 24
RNG = np.random.default_rng(7)
PROMPT = tuple(int(t) for t in RNG.integers(10, 49_000, 150))
NEIGHBOURS = [
    spec(
        f"neighbour{i}",
        tuple(int(t) for t in RNG.integers(10, 49_000, int(RNG.integers(5, 220)))),
        max_tokens=int(RNG.integers(4, 30)),
        temperature=float(i % 2),
        ignore_eos=True,
    )
    for i in range(16)
]
TARGETS = {
    "greedy": spec("target", PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True),
    "seeded": spec(
        "target", PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.8, top_p=0.95, seed=11
    ),
    "n=2": spec("target", PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True, temperature=1.0, seed=5, n=2),
}


class Run:
    """A fresh core over the shared runner (whose pages keep the stale content of earlier runs)."""

    def __init__(
        self, built: BuiltEngine, *, budget: int, caching: bool = False, lookahead: bool = False
    ) -> None:
        groups = built.runner.kv_layout.groups
        memory = PageManager(groups, [NUM_PAGES] * len(groups), caching)
        config = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=budget)
        card = built.core.card
        scheduler = Scheduler(
            config,
            memory,
            create_order("fcfs"),
            numerics_class=card.numerics_class,
            max_model_len=card.max_model_len,
            eos_token_ids=card.eos_token_ids,
        )
        self.spaces = built.memory.spaces and built.memory.spaces.mapper
        if self.spaces is not None:
            memory.map_into(self.spaces)
        self.memory = memory
        self.scheduler = scheduler
        self.core = EngineCore(
            card, scheduler, memory, InProcExecutor(built.runner, lookahead=lookahead), SystemClock()
        )
        self.rows: dict[tuple[int, int], str] = {}
        built.runner.logits_tap = self._tap

    def _tap(self, seq_id: int, position: int, logits: np.ndarray) -> None:
        request_id, choice = self.scheduler.origin_of(seq_id) or ("", 0)  # it may have ended a step ago
        if request_id == "target":
            digest = hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()
            assert self.rows.setdefault((choice, position), digest) == digest

    def __call__(
        self, *specs: RequestSpec, between: Callable[[int], object] = lambda step: None
    ) -> list[Frame]:
        for each in specs:
            self.core.submit(each)
        frames: list[Frame] = []
        step = 0
        while self.core.has_requests or self.core.steps:
            _, came = self.core.step()
            for frame in came:
                self.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))
            frames += came
            step += 1
            if self.spaces is not None:
                self.spaces.wait()
            between(step)
        self.memory.check_idle()
        assert_terminal([each.request_id for each in specs], frames)
        assert not [f.error for f in frames if f.error]
        return frames


def build_smollm2(
    smollm2: str, *, platform: str, dtype: str, kv_memory: str = "auto", **model: str
) -> BuiltEngine:
    """The default model on a platform; `model` goes to ModelConfig."""
    config = EngineConfig(
        model=ModelConfig(model=smollm2, dtype=dtype, max_model_len=1024, **model),
        cache=CacheConfig(num_pages=NUM_PAGES, kv_memory=kv_memory),
        scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=1024),
        platform=PlatformConfig(platform=platform),
    )
    return build_engine(config, SystemClock(), lambda stage, elapsed_s: None)


@pytest.fixture(scope="module", params=list(TARGETS))
def case(request: pytest.FixtureRequest, built: BuiltEngine):
    """(target, its rows and tokens when it runs alone in one piece)."""
    target = TARGETS[request.param]
    run = Run(built, budget=1024)
    frames = run(target)
    assert len(run.rows) >= MAX_TOKENS
    return target, run.rows, mine(frames)


def mine(frames: list[Frame]) -> dict[int, tuple[int, ...]]:
    return {choice: tokens for (name, choice), tokens in outputs(frames).items() if name == "target"}


@pytest.mark.parametrize("budget", [16, 64])
def test_chunk_borders_change_no_bit(built: BuiltEngine, case, budget: int) -> None:
    target, rows, tokens = case
    run = Run(built, budget=budget)
    assert mine(run(target)) == tokens
    assert run.rows == rows


def test_planning_ahead_changes_no_bit(built: BuiltEngine, case) -> None:
    target, rows, tokens = case
    run = Run(built, budget=1024, lookahead=True)
    assert mine(run(NEIGHBOURS[0], target)) == tokens
    assert run.rows == rows


@pytest.mark.parametrize("budget", [64, 1024])
def test_sixteen_neighbours_change_no_bit(built: BuiltEngine, case, budget: int) -> None:
    target, rows, tokens = case
    run = Run(built, budget=budget)
    assert mine(run(*NEIGHBOURS[:8], target, *NEIGHBOURS[8:])) == tokens
    assert run.rows == rows


def test_a_prefix_hit_changes_no_bit(built: BuiltEngine, case) -> None:
    target, rows, tokens = case
    run = Run(built, budget=64, caching=True)
    assert mine(run(target)) == tokens
    second = run(target)
    assert second[0].num_cached_tokens == 128
    assert mine(second) == tokens
    assert run.rows == rows


@pytest.mark.parametrize("caching", [False, True])
def test_preemption_and_recompute_change_no_bit(built: BuiltEngine, case, caching: bool) -> None:
    target, rows, tokens = case
    run = Run(built, budget=64, caching=caching)
    frames = run(
        target,
        *NEIGHBOURS[:3],
        between=lambda step: run.scheduler.preempt_all() if step in (2, 9, 20) else None,
    )
    assert run.scheduler.snapshot().num_preemptions >= 3
    assert mine(frames) == tokens
    assert run.rows == rows


def test_resume_on_a_fresh_engine_changes_no_bit(built: BuiltEngine, case) -> None:
    target, rows, tokens = case
    cut = 10
    emitted = tuple(tokens[c][:cut] for c in sorted(tokens))
    run = Run(built, budget=64)
    resumed = RequestSpec(
        **{f: getattr(target, f) for f in target.__struct_fields__ if f not in ("emitted", "attempt")},
        emitted=emitted,
        attempt=1,
    )
    frames = run(resumed)
    for choice, whole in tokens.items():
        assert tuple(t for f in frames if f.choice == choice for t in f.tokens) == whole[cut:]
    assert run.rows == {key: digest for key, digest in rows.items() if key[1] >= len(PROMPT) + cut - 1}
