"""Replayed programs: the eager operations' bits, whatever the shapes, and after a stop at any layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.native.native_driver import library, make_native_runner
from tests.reference.runner_driver import Driver, Seq
from tests.reference.test_bitwise import ARCHS, assert_same, tiny
from xllm.artifacts.source import DummySource
from xllm.clock import SystemClock
from xllm.config.schema import CacheConfig, EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.build import build_engine
from xllm.engine.kernels.native.fusion import fuse
from xllm.engine.kernels.native.layout import lay_out
from xllm.engine.kernels.native.programs import BUCKETS, Programs
from xllm.engine.kernels.native.recording import Node, Op, Recorder, Recording, Value
from xllm.engine.kernels.ops import Buffer, KVPages
from xllm.engine.model import llama
from xllm.engine.plan import SequencePlan, StepPlan
from xllm.engine.platform.native import PLATFORM
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler
from xllm.errors import ConfigError, InternalError
from xllm.testing.null_engine import spec

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")

NUM_PAGES = 96
VOCABULARY = 515
PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, VOCABULARY, 203)]


def make(arch: str = "llama", weight_class: str = "bf16", **changes) -> ModelRunner:
    return make_native_runner(ARCHS[arch], DummySource(ARCHS[arch]), weight_class, NUM_PAGES, **changes)


def programs_of(runner: ModelRunner) -> Programs:
    assert isinstance(runner.programs, Programs)
    return runner.programs


def mixed_steps(runner: ModelRunner) -> np.ndarray:
    """Prefill in one piece, chunks and single rows, in company whose size changes at every step."""
    rng = np.random.default_rng(5)
    driver = Driver(runner, NUM_PAGES)
    target = driver.new(PROMPT)
    others = [driver.new([int(t) for t in rng.integers(0, VOCABULARY, 150)]) for _ in range(5)]
    driver.step((target, 131))
    for i in range(5):
        driver.step(*((o, int(rng.integers(1, 30))) for o in others[:i]), (target, 1 + 7 * i))
    driver.prefill(target, 1)
    return np.concatenate([s.rows() for s in (target, *others[:4])])


@pytest.mark.parametrize("weight_class", ["bf16", "w8g32", "w4g32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_replayed_step_has_the_bits_of_the_eager_one(arch: str, weight_class: str) -> None:
    runner = make(arch, weight_class)
    programs = programs_of(runner)
    replayed = mixed_steps(runner)
    assert programs.counters.eager == 0
    replays = programs.counters.replays
    runner.programs = None
    assert_same(replayed, mixed_steps(runner))
    assert programs.counters.replays == replays > 0


@pytest.mark.parametrize("rows", range(1, 14))
def test_every_tile_shape_of_a_gate_gives_the_eager_bits(rows: int) -> None:
    arch = tiny("llama", intermediate_size=96)
    runner = make_native_runner(arch, DummySource(arch), "bf16", NUM_PAGES)
    found = []
    for programs in (runner.programs, None):
        runner.programs = programs
        driver = Driver(runner, NUM_PAGES)
        found.append(driver.prefill(driver.new(PROMPT[:rows])).rows())
    assert_same(*found)


def test_a_program_is_made_once_for_each_bucket() -> None:
    runner = make()
    mixed_steps(runner)
    first = programs_of(runner).counters
    assert first.captures == len(first.row_buckets) + len(first.logit_buckets)
    assert {*first.row_buckets, *first.logit_buckets} <= {*BUCKETS}
    mixed_steps(runner)
    assert programs_of(runner).counters.captures == first.captures


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_all_programs_share_the_memory_of_the_largest(arch: str) -> None:
    many, one = make(arch), make(arch)
    mixed_steps(many)
    driver = Driver(one, NUM_PAGES)
    largest = max(programs_of(many).counters.row_buckets)
    for rows in (largest, 128):
        driver.prefill(driver.new([7] * rows))
    assert programs_of(many).counters.arena_bytes <= 1.1 * programs_of(one).counters.arena_bytes


def test_a_step_beyond_every_bucket_is_eager_and_counted() -> None:
    runner = make()
    driver = Driver(runner, NUM_PAGES)
    alone = driver.prefill(driver.new(PROMPT)).rows()
    driver = Driver(runner, NUM_PAGES)
    seqs = [driver.new(PROMPT), *(driver.new([i + 1] * 620) for i in range(3))]
    driver.step(*((s, len(s.tokens)) for s in seqs))
    assert programs_of(runner).counters.eager == 1
    assert_same(seqs[0].rows(), alone)


def test_rows_without_logits_leave_the_same_pages() -> None:
    runner = make()
    pages = []
    for programs in (runner.programs, None):
        runner.programs = programs
        driver = Driver(runner, NUM_PAGES)
        plan = driver._plan(driver.new(PROMPT), 100, sample=False)
        silent = SequencePlan(
            seq_id=0, start=0, tokens=plan.tokens, pages=plan.pages, first_logit_row=len(plan.tokens)
        )
        runner.execute(StepPlan(step=0, sequences=(silent,)))
        pages.append(np.concatenate([g.array[list(plan.pages[0])] for g in runner._kv.groups]))
    assert pages[0].any()
    assert np.array_equal(*pages)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def stoppable(request: pytest.FixtureRequest) -> tuple[ModelRunner, np.ndarray]:
    runner = make(request.param)
    return runner, stopped_run(runner, lambda layers: None)


def stopped_run(runner: ModelRunner, hook: Callable[[int], None]) -> np.ndarray:
    programs_of(runner).on_stop = hook
    driver = Driver(runner, NUM_PAGES)
    target = driver.new(PROMPT)
    driver.step((target, 120), (driver.new(PROMPT[40:]), 70))
    driver.prefill(target, 40)
    return target.rows()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_stop_after_any_layer_changes_no_bit(stoppable, layer: int) -> None:
    runner, expected = stoppable
    programs, seen = programs_of(runner), []
    programs.control.stop_after = layer
    try:
        found = stopped_run(runner, seen.append)
    finally:
        programs.control.stop_after = 0
    assert seen == [layer] * 4
    assert_same(found, expected)


def test_a_stop_word_holds_until_it_is_taken_back(stoppable) -> None:
    runner, expected = stoppable
    programs, seen = programs_of(runner), []

    def other_work(layers: int) -> None:
        # The pool and the eager memory may be used meanwhile; the arena is the stopped step's.
        x = runner._ops.rows(np.ones((300, 96), dtype=np.float32))
        for _ in range(10):
            x = runner._ops.add(x, x)
        seen.append(layers)
        if len(seen) == 5:
            programs.control.stop = 0

    programs.control.stop = 1
    assert_same(stopped_run(runner, other_work), expected)
    assert seen == [1, 2, 3, 1, 2]
    assert programs.control.finished_layers == 3


def test_a_stop_that_nobody_waits_for_is_taken_back(stoppable) -> None:
    runner, expected = stoppable
    programs_of(runner).control.stop = 1
    before = programs_of(runner).counters.stops
    assert_same(stopped_run(runner, None), expected)  # type: ignore[arg-type]
    assert programs_of(runner).control.stop == 0
    assert programs_of(runner).counters.stops == before + 1


def test_a_traced_step_tells_when_each_layer_ended(stoppable) -> None:
    runner, expected = stoppable
    assert runner.layer_stamps() == ()
    runner.trace_layers(True)
    began_ns = time.monotonic_ns()
    try:
        assert_same(stopped_run(runner, lambda layers: None), expected)
        stamps = runner.layer_stamps()
        assert len(stamps) == 1 + runner._arch.num_layers
        told = [began_ns, *stamps, time.monotonic_ns()]
        assert told == sorted(told)
    finally:
        runner.trace_layers(False)
    stopped_run(runner, lambda layers: None)
    assert runner.layer_stamps() == ()


def _unknown_token(driver: Driver, seq: Seq) -> None:
    seq.tokens[30] = VOCABULARY + 64


def _distant_position(driver: Driver, seq: Seq) -> None:
    seq.tokens, seq.computed = [1] * 1040, 1000
    seq.pages[0] = [0] * 17


def _page_given_back(driver: Driver, seq: Seq) -> None:
    seq.computed = 100
    seq.pages[0] = [-1, 3, 4]


def _page_out_of_range(driver: Driver, seq: Seq) -> None:
    seq.computed = 10
    seq.pages[0] = [NUM_PAGES]


@pytest.mark.parametrize("spoil", [_unknown_token, _distant_position, _page_given_back, _page_out_of_range])
def test_a_step_that_reaches_beyond_its_memory_is_refused(spoil: Callable[[Driver, Seq], None]) -> None:
    runner = make()
    driver = Driver(runner, NUM_PAGES)
    seq = driver.new(PROMPT)
    spoil(driver, seq)
    with pytest.raises(InternalError):
        driver.step((seq, 40))


def test_the_words_of_a_step_must_be_as_many_as_they_say() -> None:
    programs = programs_of(make())
    good = [1, 0, 0, 1, 7, 5]  # one row at 0, one page; token 7; page 5
    spoilt = [
        good[:-1], [*good, 0], [-1, *good[1:]], [1, -1, 0, 1, 7, 5], [1, 0, 2, 1, 7, 5], [1, 64, 0, 1, 7, 5],
        [1 << 62, *good[1:]], [1, 0, 0, 1 << 62, 7, 5], [1, 0, 0, -1, 7], [1, 1 << 62, 0, 1, 7, 5],
    ]  # fmt: skip
    for words, refused in [(good, False), *((w, True) for w in spoilt)]:
        array = np.array(words, dtype=np.int64)
        code = programs._lib.xn_step_set(programs._step, array.ctypes.data, len(words), 1)
        assert bool(code) == refused, words


def recording_of(runner: ModelRunner) -> Recording:
    """Of the forward pass, fused."""
    return programs_of(runner)._forward


def test_a_layer_of_llama_becomes_nine_operations() -> None:
    nodes = recording_of(make("llama")).nodes
    ends = [i for i, n in enumerate(nodes) if n.op is Op.END_LAYER]
    assert [n.op.name for n in nodes[ends[0] + 1 : ends[1]]] == [
        "RMS_NORM_ROUNDED", "LINEAR_FUSED", "ROPE", "ROPE", "ATTENTION", "LINEAR_FUSED",
        "RMS_NORM_ROUNDED", "LINEAR_FUSED", "LINEAR_FUSED",
    ]  # fmt: skip


def test_a_value_with_two_readers_is_computed() -> None:
    weights = make("llama", programs=False)._weights
    w = weights.layers[0]
    recorder = Recorder(())
    x = Buffer(Value(96, True, 4 * 96))
    normed = recorder.rms_norm(x, w["input_layernorm"], 1e-6)
    product = recorder.linear(recorder.silu_mul(recorder.linear(normed, w["gate_up"])), w["down"])
    total = recorder.add(recorder.add(product, normed), product)
    assert isinstance(total, Value)
    nodes = fuse(Recording(tuple(recorder.nodes), total), lambda m: 2 * m.num_in).nodes
    assert [n.op.name for n in nodes] == ["RMS_NORM", "LINEAR_FUSED", "LINEAR", "ADD", "ADD"]


@pytest.mark.parametrize("arch", ARCHS)
def test_no_two_living_values_overlap(arch: str) -> None:
    recording = recording_of(make(arch))
    rows = 37
    offsets = lay_out(recording, rows, frozenset({recording.result})).offsets
    nodes = recording.nodes
    for position, node in enumerate(nodes):
        later = {v.root for n in nodes[position + 1 :] for v in n.inputs}
        made = {n.output for n in nodes[: position + 1]}
        living = sorted((offsets[v], v.row_bytes * rows) for v in later & made if v in offsets)
        for (begin, size), (following, _) in zip(living, living[1:], strict=False):
            assert begin + size <= following
        _check_writes(node, offsets, rows)


def _check_writes(node: Node, offsets, rows: int) -> None:
    """A node writes over an input only where every element meets its own place."""
    if node.output not in offsets:
        return
    begin, size = offsets[node.output], node.output.row_bytes * rows
    for value in node.inputs:
        root = value.root
        apart = begin + size <= offsets[root] or offsets[root] + root.row_bytes * rows <= begin
        assert apart or (begin == offsets[root] and value is root and root.row_bytes == node.output.row_bytes)


def config(programs: str) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(dtype="bfloat16", quantize="none"),
        cache=CacheConfig(num_pages=32),
        platform=PlatformConfig(platform="native", num_threads=1, programs=programs),  # type: ignore[arg-type]
    )


def build(programs: str, platform=PLATFORM):
    arch = ARCHS["llama"]
    return platform.create_runner(arch, DummySource(arch), config(programs), 512, Sampler())


@pytest.mark.parametrize(("asked", "replays"), [("auto", True), ("on", True), ("off", False)])
def test_the_switch_is_obeyed_and_reported(asked: str, replays: bool) -> None:
    built = build(asked)
    assert (built.runner.programs is not None) == replays
    assert any(line.startswith(f"programs={'on' if replays else 'off'}: ") for line in built.report)


@pytest.mark.slow
def test_an_engine_tells_what_it_recorded_and_replayed(smollm2: str) -> None:
    config = EngineConfig(
        model=ModelConfig(model=smollm2, max_model_len=256),
        cache=CacheConfig(num_pages=8),
        platform=PlatformConfig(platform="native", num_threads=1),
    )
    core = build_engine(config, SystemClock(), lambda stage, elapsed_s: None).core
    core.submit(spec("one", (1, 2, 3), max_tokens=2))
    while core.has_requests:
        core.step()
    snapshot = core.snapshot()
    assert snapshot.program_captures == 3  # for 3 rows, for 1 row, and the head
    assert snapshot.program_replays == 4
    assert snapshot.num_eager_steps == 0
    assert snapshot.program_arena_bytes > 0


def test_a_platform_that_cannot_record_refuses_only_if_asked() -> None:
    cpu = pytest.importorskip("xllm.engine.platform.cpu").PLATFORM
    assert any(line.startswith("programs=off: ") for line in build("auto", cpu).report)
    with pytest.raises(ConfigError, match="programs=on"):
        build("on", cpu)


def test_a_model_that_looks_into_its_buffers_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(ops, arch, weights, kv: KVPages, batch) -> Buffer:
        batch.token_ids.array.max()
        return llama.forward(ops, arch, weights, kv, batch)

    peeking = replace(llama.DEFINITION, forward=forward)
    monkeypatch.setattr("xllm.engine.platform.loading.find_model", lambda name: peeking)
    built = build("auto")
    assert any("could not be recorded" in line for line in built.report)
    driver = Driver(built.runner, 32)
    assert len(driver.prefill(driver.new(PROMPT)).rows()) == len(PROMPT)
    with pytest.raises(ConfigError, match="programs=on"):
        build("on")


def test_a_model_without_layer_marks_runs_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stopped_run(make(), lambda layers: None)
    monkeypatch.setattr(Recorder, "end_layer", lambda self, layer: None)
    runner = make()
    programs_of(runner).control.stop = 1
    assert_same(stopped_run(runner, lambda layers: None), expected)
    assert programs_of(runner).counters.stops == 0
    assert programs_of(runner).control.finished_layers == 0
