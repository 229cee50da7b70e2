"""Steps handed over while one runs: the tokens, logits and pages of those that are executed one by one."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest

from tests.native.chains import EOS, Chain, Line
from tests.native.native_driver import library, make_native_runner
from tests.native.test_programs import NUM_PAGES, VOCABULARY, build, programs_of
from tests.reference.test_bitwise import ARCHS
from xllm.artifacts.source import DummySource
from xllm.engine.kernels.native.ops import NativeOps
from xllm.engine.plan import PENDING, PageCopy, StepPlan, StepResult
from xllm.engine.platform.base import StepQueue
from xllm.engine.runner.queued import QueuedRunner
from xllm.errors import InternalError
from xllm.types import SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")

RNG = np.random.default_rng(11)
GREEDY = SamplingParams(temperature=0.0)
PLAIN = {
    "greedy": GREEDY,
    "seeded": SamplingParams(temperature=0.9, seed=5),
    "top-k": SamplingParams(temperature=1.3, seed=6, top_k=20),
    "top-p": SamplingParams(temperature=1.1, seed=7, top_p=0.7, min_p=0.001),
    "min-tokens": SamplingParams(temperature=1.0, seed=8, min_tokens=4),
    "allowed": SamplingParams(temperature=1.0, seed=9, allowed_token_ids=(3, 7, 33, 64, 65, 400, 514)),
    "bad-word": SamplingParams(temperature=0.0, bad_words_token_ids=((9,), (12,))),
    "two": SamplingParams(temperature=1.0, seed=10, n=2),
}
"""What the queue finishes alone."""
ASKING = {
    "penalties": SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.5, presence_penalty=0.7),
    "frequency": SamplingParams(temperature=0.0, frequency_penalty=1.5),
    "bias": SamplingParams(temperature=1.0, seed=2, logit_bias={7: 3.0, 8: -4.0}),
    "bad-words": SamplingParams(temperature=0.0, bad_words_token_ids=((5, 6), (1, 2))),
    "logprobs": SamplingParams(temperature=1.0, seed=3, logprobs=3),
    "scored": SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=0),
}
NUM_TOKENS = 6


def make(arch: str = "llama", **changes) -> QueuedRunner:
    return make_native_runner(ARCHS[arch], DummySource(ARCHS[arch]), "bf16", NUM_PAGES, **changes)


def prompt(length: int) -> list[int]:
    return [int(t) for t in RNG.integers(0, VOCABULARY, length)]


LENGTHS = [5, 61, 130, 3, 64, 17, 90, 2]
PROMPTS = [prompt(n) for n in LENGTHS]


@pytest.fixture(
    scope="module", params=[("llama", 2), ("llama", 1), ("gemma3", 2)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def runner(request: pytest.FixtureRequest) -> QueuedRunner:
    arch, threads = request.param
    return make(arch, num_threads=threads)


def started(runner: QueuedRunner, params: Sequence[SamplingParams], tapped: bool, chunk: int = 40) -> Chain:
    runner.logits_tap = None
    for group in runner._kv.groups:
        group.array[:] = 0
    chain = Chain(runner, NUM_PAGES, tapped)
    for i, one in enumerate(params):
        chain.add(PROMPTS[i % len(PROMPTS)], one, NUM_TOKENS, chunk)
    return chain


def told(line: Line) -> tuple[object, ...]:
    return line.seq_id, line.tokens, line.logprobs, line.prompt_logprobs, line.error


def assert_equal(found: Chain, expected: Chain) -> None:
    assert [told(line) for line in found.lines] == [told(line) for line in expected.lines]
    assert found.rows == expected.rows


@pytest.mark.parametrize("tapped", [True, False], ids=["logits", "tokens"])
@pytest.mark.parametrize("params", [PLAIN, ASKING, {**PLAIN, **ASKING}], ids=["plain", "asking", "both"])
def test_a_queued_chain_equals_the_executed_one(runner: QueuedRunner, params, tapped: bool) -> None:
    expected = started(runner, list(params.values()), tapped).execute()
    pages = [expected.pages_of(line).copy() for line in expected.lines]
    found = started(runner, list(params.values()), tapped).queue()
    assert found.num_pending >= 4 * len(params) and expected.num_pending == 0
    assert_equal(found, expected)
    if len(runner.kv_layout.groups) == 1 and "two" not in params:
        assert all(np.array_equal(a, found.pages_of(b)) for a, b in zip(pages, found.lines, strict=True))


def test_what_the_queue_finishes_alone_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make()
    monkeypatch.setattr(runner, "_sample", None)
    started(runner, list(PLAIN.values()), tapped=False).queue()
    for params in ASKING.values():
        with pytest.raises(TypeError):
            started(runner, [params], tapped=False).queue()
        while runner._under_way:
            assert runner.collect().dropped


def test_a_batch_of_64_beside_prompts_in_chunks(runner: QueuedRunner) -> None:
    def chain(tapped: bool) -> Chain:
        made = started(runner, [], tapped)
        for i in range(64):
            made.add(PROMPTS[3][: 1 + i % 3], list(PLAIN.values())[i % 7], 4, 40)
        made.add(PROMPTS[2], GREEDY, 2, 33)
        return made

    for tapped in (True, False):
        assert_equal(chain(tapped).queue(), chain(tapped).execute())


def test_more_logits_than_a_slice_holds() -> None:
    """Of the three slices the middle one asks: tokens keep their places."""
    runner = make()
    asking = SamplingParams(temperature=0.0, prompt_logprobs=1)

    def chain() -> Chain:
        made = started(runner, [GREEDY] * 40, tapped=False)
        for line in made.lines:
            line.tokens, line.prompt = line.tokens[:2], line.tokens[:2]
        made.add(PROMPTS[2], asking, 3)
        for i in range(40):
            made.add([i + 1], PLAIN["seeded"], 3)
        return made

    found, expected = chain().queue(), chain().execute()
    assert_equal(found, expected)
    assert len(found.lines[40].prompt_logprobs) == len(PROMPTS[2]) - 1


def test_a_step_that_fails_drops_the_one_behind_it() -> None:
    runner = make()
    chain = started(runner, [GREEDY, GREEDY], tapped=False)
    chain.lines[1].tokens = chain.lines[1].prompt = [VOCABULARY + 64] * 3
    first = chain.plan()
    behind = chain.plan()
    assert first is not None and behind is not None
    pool = runner._kv.groups[0].array
    pool[90] = 7
    runner.submit(first)
    runner.submit(StepPlan(step=2, sequences=behind.sequences, copies=(PageCopy(0, 90, 91),)))
    with pytest.raises(InternalError):
        runner.collect()
    assert runner.collect() == StepResult(step=2, sequences=(), dropped=True)
    assert not pool[91].any()
    assert_equal(started(runner, [GREEDY], True).queue(), started(runner, [GREEDY], True).execute())


@pytest.mark.parametrize("spoil", ["page", "copy", "pending"])
def test_a_plan_that_cannot_be_handed_over_fails_at_its_turn(spoil: str) -> None:
    runner = make()
    chain = started(runner, [GREEDY], tapped=False, chunk=1000)
    good = chain.plan()
    assert good is not None
    sequence = good.sequences[0]
    bad = {
        "page": StepPlan(step=2, sequences=(_with(sequence, pages=((NUM_PAGES,),)),)),
        "copy": StepPlan(step=2, sequences=(), copies=(PageCopy(0, 1, NUM_PAGES),)),
        "pending": StepPlan(step=2, sequences=(_with(sequence, seq_id=9, tokens=(PENDING,), pending=True),)),
    }[spoil]
    runner.submit(good)
    runner.submit(bad)
    assert runner.collect().sequences[0].choices
    runner.submit(StepPlan(step=3, sequences=good.sequences))
    with pytest.raises(InternalError):
        runner.collect()
    assert runner.collect().dropped
    runner.submit(good)
    assert runner.collect().sequences[0].choices


def _with(sequence, **changes):
    return type(sequence)(**{**{f: getattr(sequence, f) for f in sequence.__struct_fields__}, **changes})


@pytest.mark.parametrize("params", [GREEDY, ASKING["logprobs"]], ids=["plain", "asking"])
def test_a_row_of_nan_ends_its_sequence_only(params: SamplingParams) -> None:
    runner = make()

    def chain(queued: bool) -> Chain:
        made = started(runner, [params, GREEDY, PLAIN["seeded"]], tapped=False, chunk=1000)
        plan = made.plan()
        assert plan is not None
        made.absorb(plan, runner.execute(plan))
        runner._kv.groups[0].array[made.lines[0].pages[0]] = 0xFF
        return made.queue() if queued else made.execute()

    found, expected = chain(queued=True), chain(queued=False)
    assert found.lines[0].error is not None
    assert_equal(found, expected)


@pytest.mark.parametrize("layer", [1, 3])
def test_a_stop_at_a_layer_changes_nothing(runner: QueuedRunner, layer: int) -> None:
    params = [*PLAIN.values(), ASKING["penalties"]]
    expected = started(runner, params, tapped=True).execute()
    programs, seen = programs_of(runner), []
    programs.on_stop = seen.append
    programs.control.stop_after = layer
    try:
        found = started(runner, params, tapped=True).queue()
    finally:
        programs.control.stop_after, programs.on_stop = 0, None
    assert_equal(found, expected)
    assert seen == [layer] * len(found.results)
    programs.control.stop = 1  # nobody waits for it
    assert_equal(started(runner, params, tapped=True).queue(), expected)
    assert programs.control.stop == 0


def test_the_arena_may_grow_while_a_step_is_under_way() -> None:
    runner = make()
    chain = started(runner, [GREEDY], tapped=True, chunk=1000)
    first = chain.plan()
    assert first is not None
    runner.submit(first)
    before = programs_of(runner).counters.arena_bytes
    chain.add(PROMPTS[2] * 4, GREEDY, NUM_TOKENS)
    second = chain.plan()
    assert second is not None
    runner.submit(second)
    assert programs_of(runner).counters.arena_bytes > 2 * before
    chain.absorb(first, runner.collect())
    chain.absorb(second, runner.collect())
    chain.queue()
    expected = started(runner, [GREEDY], tapped=True, chunk=1000)
    expected.add(PROMPTS[2] * 4, GREEDY, NUM_TOKENS)
    assert_equal(chain, expected.execute())


@pytest.mark.parametrize("closes", [True, False])
def test_a_queue_ends_with_steps_under_way(closes: bool) -> None:
    runner = make()
    for tapped in (False, True):
        chain = started(runner, [GREEDY, GREEDY], tapped)
        runner.submit(chain.plan())  # type: ignore[arg-type]
        runner.submit(chain.plan())  # type: ignore[arg-type]
        if closes:
            runner.close()
            runner.close()
        del chain, runner
        gc.collect()
        runner = make()


def test_steps_beyond_every_bucket_run_in_their_turn() -> None:
    runner = make()

    def chain() -> Chain:
        made = started(runner, [GREEDY, ASKING["penalties"]], tapped=True, chunk=30)
        for i in range(3):
            made.add([i + 1] * 700, GREEDY, 2)
        return made

    found, expected = chain(), chain().execute()
    assert programs_of(runner).counters.eager > 0
    assert found.num_pending == 0
    runner.logits_tap = found._tap
    assert_equal(found.queue(), expected)
    assert found.num_pending > 0


def test_without_programs_steps_run_when_they_are_collected(runner: QueuedRunner) -> None:
    expected = started(runner, [*PLAIN.values(), *ASKING.values()], tapped=True).execute()
    programs = runner.programs
    runner.programs = None
    try:
        assert_equal(started(runner, [*PLAIN.values(), *ASKING.values()], tapped=True).queue(), expected)
    finally:
        runner.programs = programs


def test_only_what_records_offers_a_queue() -> None:
    assert isinstance(build("auto").runner, StepQueue)
    assert not isinstance(build("off").runner, StepQueue)


def test_at_most_two_steps_are_under_way_and_none_is_executed_meanwhile() -> None:
    runner = make()
    chain = started(runner, [GREEDY], tapped=False, chunk=10)
    plans = [chain.plan() for _ in range(2)]
    with pytest.raises(InternalError):
        runner.collect()
    for plan in plans:
        runner.submit(plan)  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        runner.submit(plans[0])  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        runner.execute(plans[0])  # type: ignore[arg-type]
    assert [runner.collect().step for _ in plans] == [1, 2]


def test_a_hook_that_fails_ends_its_step_and_the_one_behind() -> None:
    runner = make()

    class Odd(Exception):
        pass

    def hook(*_: object) -> None:
        raise Odd

    for tapped in (True, False):
        chain = started(runner, [GREEDY], tapped=False, chunk=2)
        plans = [chain.plan() for _ in range(3)]
        if tapped:
            runner.logits_tap = hook
            plans = plans[2:]
            plans.append(chain.plan())
        else:
            programs_of(runner).on_stop, programs_of(runner).control.stop_after = hook, 2
        for plan in plans[:2]:
            runner.submit(plan)  # type: ignore[arg-type]
        with pytest.raises(Odd):
            runner.collect()
        assert runner.collect().dropped
    programs_of(runner).on_stop, programs_of(runner).control.stop_after = None, 0
    assert_equal(started(runner, [GREEDY], True).queue(), started(runner, [GREEDY], True).execute())


def test_stamps_words_and_counters_of_queued_steps(runner: QueuedRunner) -> None:
    before = runner.num_forwards
    runner.trace_layers(True)
    try:
        chain = started(runner, [*PLAIN.values(), ASKING["logprobs"]], tapped=False).queue()
        stamps = [s / 1e9 for s in runner.layer_stamps()]
    finally:
        runner.trace_layers(False)
    times = [t for r in chain.results for t in (r.began_s, r.ended_s)]
    assert times == sorted(times) and times[0] > 0
    last = chain.results[-1]
    assert [last.began_s, *stamps, last.ended_s] == sorted([last.began_s, *stamps, last.ended_s])
    assert len(stamps) == 1 + runner._arch.num_layers == 1 + runner.finished_layers
    assert runner.num_forwards == before + len(chain.results)
    executed = started(runner, [GREEDY], tapped=False).execute().results
    times = [t for r in executed for t in (r.began_s, r.ended_s)]
    assert times == sorted(times) and times[0] > 0


def test_a_queue_of_other_programs_is_refused() -> None:
    assert EOS < VOCABULARY
    ops = make()._ops
    assert isinstance(ops, NativeOps)
    with pytest.raises(TypeError):
        ops.queue(object())  # type: ignore[arg-type]
