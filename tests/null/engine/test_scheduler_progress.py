"""Every mix of priorities, choices and arrivals comes to its end, whatever the shortage of pages.

Hundreds of small runs. Their readers are prompt, so that no step may stand still: without a plan the step
thread would wait for a message, and none need come.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from xllm.config import SchedulerConfig
from xllm.errors import RequestError
from xllm.testing.null_engine import FULL, WINDOW, NullEngine, null_engine, outputs, spec
from xllm.wire.messages import Frame

MAX_STEPS = 400
MAX_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Job:
    prompt_len: int
    n: int
    priority: int
    at_step: int
    family: int


@dataclass(frozen=True, slots=True)
class Case:
    """A run as a value, so that a failing one can be read and told."""

    jobs: tuple[Job, ...]
    num_pages: int
    policy: str
    max_seqs: int
    budget: int
    caching: bool
    windowed: bool
    max_tokens: int = MAX_TOKENS


def prompt_len(r: random.Random) -> int:
    """Often one whose sequences want another page within their first tokens."""
    return 64 * r.randint(1, 4) - r.randint(0, 5) if r.random() < 0.7 else r.randint(60, 300)


def drawn(seed: int) -> Case:
    r = random.Random(seed)
    same_prompts = r.random() < 0.3
    return Case(
        jobs=tuple(
            Job(prompt_len(r), r.randint(1, 3), r.randint(-2, 2), r.randint(0, 12), 0 if same_prompts else i)
            for i in range(r.randint(2, 4))
        ),
        num_pages=r.randint(5, 8),
        policy=r.choice(("fcfs", "priority", "priority")),
        max_seqs=r.choice((2, 4, 8)),
        budget=r.choice((16, 128, 512)),
        caching=r.random() < 0.7,
        windowed=r.random() < 0.3,
    )


def run(case: Case) -> tuple[NullEngine, list[Frame]]:
    """Raises AssertionError when a step stands still without a reason, or when there is no end."""
    config = SchedulerConfig(
        max_num_seqs=case.max_seqs, max_num_batched_tokens=case.budget, scheduling_policy=case.policy
    )
    engine = null_engine(
        num_pages=case.num_pages,
        groups=(FULL, WINDOW) if case.windowed else (FULL,),
        config=config,
        enable_prefix_caching=case.caching,
    )
    core = engine.core
    frames: list[Frame] = []
    left = sorted(enumerate(case.jobs), key=lambda entry: entry[1].at_step)
    for step in range(MAX_STEPS):
        while left and left[0][1].at_step <= step:
            number, job = left.pop(0)
            prompt = tuple((7 * k + 13 * job.family) % 500 + 3 for k in range(job.prompt_len))
            try:
                core.submit(
                    spec(
                        f"r{number}", prompt, max_tokens=case.max_tokens, n=job.n, priority=job.priority,
                        temperature=1.0, seed=number, ignore_eos=True,
                    )
                )  # fmt: skip
            except RequestError as refused:
                assert refused.code == "context_length_exceeded"  # noqa: PT017
        if not left and not core.has_requests:
            engine.memory.check_idle()
            return engine, frames
        could = core.has_requests
        ran, came = core.step()
        assert ran or not could, f"nothing ran in step {step} of {case}"
        frames += came
        for frame in came:
            core.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))
    raise AssertionError(f"requests are alive after {MAX_STEPS} steps of {case}")


@pytest.mark.parametrize("block", range(4))
def test_every_request_ends_within_bounded_steps(block: int) -> None:
    num_preemptions = 0
    for seed in range(block * 150, (block + 1) * 150):
        engine, frames = run(drawn(seed))
        assert all(len(tokens) == MAX_TOKENS for tokens in outputs(frames).values())
        num_preemptions += engine.core.snapshot().num_preemptions
    assert num_preemptions > 100, "pages were hardly short"


@pytest.mark.parametrize("last_at", range(3, 12))
def test_a_waiting_choice_gives_its_pages_to_a_more_urgent_request(last_at: int) -> None:
    """Choices just forked hold pages while they wait; once their sibling was displaced, nobody ran again."""
    case = Case(
        jobs=(Job(238, 3, 0, 0, 0), Job(179, 3, -1, 2, 1), Job(178, 3, -2, last_at, 2)),
        num_pages=6,
        policy="priority",
        max_seqs=8,
        budget=128,
        caching=True,
        windowed=False,
        max_tokens=20,
    )
    engine, frames = run(case)
    assert engine.core.snapshot().num_preemptions
    assert {key: len(tokens) for key, tokens in outputs(frames).items()} == {
        (f"r{i}", choice): 20 for i in range(3) for choice in range(3)
    }
