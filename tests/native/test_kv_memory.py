"""Pages as bytes: carried to another engine they go on bit by bit; a layer's are final at its border."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.native.native_driver import library, make_native_runner
from tests.reference.runner_driver import Driver, Seq, make_runner
from tests.reference.test_bitwise import ARCHS, assert_same
from xllm.artifacts.source import DummySource
from xllm.engine.kernels.native.programs import Programs
from xllm.engine.kvtransfer.copying import copy_parts
from xllm.engine.kvtransfer.memory import KVMemory
from xllm.engine.runner.runner import ModelRunner

NUM_PAGES = 24
PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, 515, 203)]

NATIVE = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")


def _native(arch: str, kv_dtype: str) -> ModelRunner:
    return make_native_runner(ARCHS[arch], DummySource(ARCHS[arch]), "bf16", NUM_PAGES, kv_dtype=kv_dtype)  # type: ignore[arg-type]


def _reference(arch: str, dtype: str) -> ModelRunner:
    return make_runner(ARCHS[arch], DummySource(ARCHS[arch]), dtype, NUM_PAGES)


def _memory(runner: ModelRunner) -> KVMemory:
    memory = runner.kv_memory()
    assert memory is not None
    return memory


def _reserve(driver: Driver, like: Seq) -> Seq:
    """The same sequence on another engine, in other pages, none of them computed here."""
    twin = driver.new(like.tokens)
    twin.pages = [
        [driver._free[g].pop() if p >= 0 else -1 for p in pages] for g, pages in enumerate(like.pages)
    ]
    twin.computed = like.computed
    return twin


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(_native, "bfloat16", marks=NATIVE),
        pytest.param(_native, "int8", marks=NATIVE),
        (_reference, "float32"),
        (_reference, "bfloat16"),
    ],
)
def test_a_sequence_goes_on_in_pages_that_were_carried_over(
    arch: str, make: Callable[[str, str], ModelRunner], dtype: str
) -> None:
    here, there = make(arch, dtype), make(arch, dtype)
    source, target = Driver(here, NUM_PAGES, seed=1), Driver(there, NUM_PAGES, seed=2)
    seq = source.prefill(source.new(PROMPT[:150]), 64)
    twin = _reserve(target, seq)
    for g, (a, b) in enumerate(zip(_memory(here).groups, _memory(there).groups, strict=True)):
        used = [(p, q) for p, q in zip(seq.pages[g], twin.pages[g], strict=True) if p >= 0]
        pages, slots = [p for p, _ in used], [q for _, q in used]
        for spans in a.spans:
            for offset, length in spans:
                copy_parts(b.pages, slots, a.pages, pages, offset, length)
        assert np.array_equal(a.pages[pages], b.pages[slots])  # the spans leave nothing out
    for one in (seq, twin):
        one.tokens += PROMPT[150:]
        one.logits.clear()
    source.prefill(seq, 20)
    target.prefill(twin, 7)
    assert_same(seq.rows(), twin.rows())


@NATIVE
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_a_layers_bytes_are_final_when_the_word_has_passed_it(arch: str, kv_dtype: str) -> None:
    runner = _native(arch, kv_dtype)
    programs, memory = runner.programs, _memory(runner)
    assert isinstance(programs, Programs)
    copies = [np.zeros_like(group.pages) for group in memory.groups]
    copied: set[int] = set()

    def at_border(finished: int) -> None:
        for group, copy in zip(memory.groups, copies, strict=True):
            for layer, spans in zip(group.layers, group.spans, strict=True):
                if layer < finished and layer not in copied:
                    copied.add(layer)
                    for offset, length in spans:
                        copy[:, offset : offset + length] = group.pages[:, offset : offset + length]

    programs.on_stop = at_border
    programs.control.stop = 1
    driver = Driver(runner, NUM_PAGES)
    driver.prefill(driver.new(PROMPT))
    assert copied == set(range(ARCHS[arch].num_layers))
    for group, copy in zip(memory.groups, copies, strict=True):
        assert group.pages.any()
        assert np.array_equal(group.pages, copy)


@NATIVE
def test_the_word_is_forgotten_between_steps_and_forward_passes_are_counted() -> None:
    runner = _native("llama", "bfloat16")
    driver = Driver(runner, NUM_PAGES)
    assert runner.num_forwards == runner.finished_layers == 0
    driver.prefill(driver.new(PROMPT), 100)
    assert runner.finished_layers == ARCHS["llama"].num_layers
    assert runner.num_forwards == 3
    runner.forget_layers()
    assert runner.finished_layers == 0
