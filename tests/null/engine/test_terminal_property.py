"""Random schedules of submit, abort, preempt, slow readers and injected failures on the null engine."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.config import SchedulerConfig
from xllm.errors import CapacityError
from xllm.testing.null_engine import FULL, WINDOW, null_engine, outputs, spec
from xllm.testing.terminal import assert_terminal
from xllm.types import FinishReason

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True)
class Job:
    prompt_len: int
    family: int
    max_tokens: int
    n: int
    temperature: float
    priority: int
    prompt_logprobs: bool


jobs = st.builds(
    Job,
    prompt_len=st.integers(1, 260),
    family=st.integers(0, 2),
    max_tokens=st.integers(1, 90),
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    priority=st.integers(0, 2),
    prompt_logprobs=st.booleans(),
)
actions = st.one_of(
    st.tuples(st.just("submit"), jobs),
    st.tuples(st.just("step"), st.integers(1, 30)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("preempt"), st.just(0)),
    st.tuples(st.just("fail"), st.integers(0, 20)),
    st.tuples(st.just("reset_cache"), st.just(0)),
)


def prompt_of(job: Job) -> tuple[int, ...]:
    # Three families of prompts share prefixes, so the cache is hit for real.
    return tuple((7 * i + 13 * job.family) % 500 + 3 for i in range(job.prompt_len))


def spec_of(name: str, job: Job):
    return spec(
        name,
        prompt_of(job),
        max_tokens=job.max_tokens,
        n=job.n,
        temperature=job.temperature,
        seed=job.family,
        priority=job.priority,
        prompt_logprobs=1 if job.prompt_logprobs else None,
    )


def alone(job: Job) -> dict[int, tuple[int, ...]]:
    engine = null_engine(num_pages=64, groups=(FULL, WINDOW), enable_prefix_caching=False)
    engine.core.submit(spec_of("alone", job))
    frames = engine.run()
    assert frames[-1].finish_reason in COMPLETE
    return {choice: tokens for (_, choice), tokens in outputs(frames).items()}


schedules = st.fixed_dictionaries(
    {
        "schedule": st.lists(actions, min_size=3, max_size=40),
        "num_pages": st.integers(8, 24),
        "budget": st.sampled_from([16, 64, 512]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "caching": st.booleans(),
        "lookahead": st.booleans(),
    }
)


@given(case=schedules)
@settings(max_examples=60, deadline=None)
def test_every_accepted_request_ends_once_with_its_own_tokens(case) -> None:
    check_schedule(**case)


def check_schedule(
    schedule, num_pages: int, budget: int, policy: str, caching: bool, lookahead: bool = False
) -> None:
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=budget, scheduling_policy=policy, max_num_queued_reqs=6
    )
    engine = null_engine(
        num_pages=num_pages,
        groups=(FULL, WINDOW),
        config=config,
        enable_prefix_caching=caching,
        lookahead=lookahead,
    )
    accepted: dict[str, Job] = {}
    failing: set[str] = set()
    aborted: set[str] = set()
    frames = []

    def fault(entry) -> None:
        origin = engine.core.scheduler.origin_of(entry.seq_id)  # None: it ended while its rows were under way
        if origin is not None and origin[0] in failing:
            raise RuntimeError("injected")

    engine.runner.fault = fault
    for action, value in schedule:
        names = list(accepted)
        if action == "submit":
            name = f"r{len(accepted)}"
            try:
                engine.core.submit(spec_of(name, value))
                accepted[name] = value
            except CapacityError:
                assert engine.core.snapshot().num_requests >= 10
        elif action == "step":
            for _ in range(value):
                frames += engine.step()
        elif action == "abort" and names:
            engine.core.abort(names[value % len(names)])
            aborted.add(names[value % len(names)])
        elif action == "preempt":
            engine.core.scheduler.preempt_all()
        elif action == "fail" and names:
            failing.add(names[value % len(names)])
        elif action == "reset_cache":
            engine.memory.reset_prefix_cache()
        snapshot = engine.core.snapshot()
        assert snapshot.free_pages + snapshot.cached_pages + snapshot.owned_pages == snapshot.total_pages
    frames += engine.run()
    frames += engine.step()

    assert_terminal(accepted, frames)
    engine.memory.check_idle()
    snapshot = engine.core.snapshot()
    assert snapshot.num_accepted == snapshot.num_ended == len(accepted)
    got = outputs(frames)
    reasons = {f.request_id: f.finish_reason for f in frames if f.last}
    for name, job in accepted.items():
        expected = alone(job)
        complete = reasons[name] in COMPLETE
        assert complete or name in failing | aborted
        for choice, tokens in expected.items():
            mine = got.get((name, choice), ())
            assert mine == (tokens if complete else tokens[: len(mine)])


@given(cut=st.integers(1, 40), n=st.integers(1, 2), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_resume_continues_where_the_first_attempt_stopped(cut: int, n: int, seed: int) -> None:
    prompt = tuple(range(10, 90))
    fields = {
        "max_tokens": 40,
        "n": n,
        "temperature": 1.0,
        "seed": seed,
        "presence_penalty": 0.5,
        "min_tokens": 30,
    }
    first = null_engine()
    first.core.submit(spec("a", prompt, **fields))
    whole = {c: t for (_, c), t in outputs(first.run()).items()}
    emitted = tuple(whole[c][: min(cut, len(whole[c]) - 1)] for c in range(n))
    second = null_engine()
    second.core.submit(spec("a", prompt, emitted=emitted, attempt=1, **fields))
    frames = second.run()
    assert all(f.attempt == 1 for f in frames)
    for choice in range(n):
        rest = tuple(t for f in frames if f.choice == choice for t in f.tokens)
        assert emitted[choice] + rest == whole[choice]
        assert min(f.offset for f in frames if f.choice == choice and f.tokens) == len(emitted[choice])
