"""Promise 1 on the native kernels, for every model and weight class: `make exactness` (minutes).

Whole engines run the suite of `tests.exactness`; below it, runners compare the bits of every row's logits.
`make test` has the same checks over tiny models and SmolLM2.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from tests.exactness import (  # noqa: F401  (pytest collects what is imported)
    build_smollm2,
    case,
    test_a_prefix_hit_changes_no_bit,
    test_chunk_borders_change_no_bit,
    test_preemption_and_recompute_change_no_bit,
    test_resume_on_a_fresh_engine_changes_no_bit,
    test_sixteen_neighbours_change_no_bit,
)
from tests.reference.runner_driver import Driver
from xllm.artifacts.resolve import resolve
from xllm.config.schema import CacheConfig, EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.build import BuiltEngine
from xllm.engine.kernels.native.library import find
from xllm.engine.kernels.native.programs import Programs
from xllm.engine.platform.native import PLATFORM
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler
from xllm.errors import ConfigError

PATH, WHY = find()
pytestmark = [
    pytest.mark.robustness,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(PATH is None, reason=f"no native kernels: {WHY}"),
]

MODELS = ("smollm2", "qwen2.5-coder-0.5b-instruct", "gemma3-270m")
CLASSES = tuple(name for name in get_args(get_type_hints(ModelConfig)["quantize"]) if name != "auto")
NUM_PAGES = 160
PROMPT = [int(t) for t in np.random.default_rng(3).integers(10, 49_000, 150)]
COMPANY = [[int(t) for t in np.random.default_rng(i).integers(10, 49_000, 40)] for i in range(63)]
WAYS = {
    "chunks of 7": [7] * 21 + [3],
    "chunks of 16": [16] * 9 + [6],
    "chunks of 64": [64, 64, 22],
    "decode": [1] * 150,
    "prefill and decode": [100, *[1] * 50],
}


# One parameter, and of the session, above the suite's own `case`: pytest then loads a model once per class.
@pytest.fixture(scope="session", params=[(m, c) for m in MODELS for c in CLASSES], ids="-".join)
def setting(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(model, weight class)."""
    model, quantize = request.param
    try:
        resolve(model, allow_pull=False)
    except ConfigError as error:
        pytest.skip(f"{model} is not on this machine: {error}")
    return model, quantize


@pytest.fixture(scope="session")
def built(setting: tuple[str, str]) -> Iterator[BuiltEngine]:
    model, quantize = setting
    made = build_smollm2(model, platform="native", dtype="bfloat16", quantize=quantize)
    yield made
    made.runner.close()


# Runners

Rows = dict[int, str]
"""The digest of the logits behind each position."""


@dataclass(frozen=True, slots=True)
class Runners:
    """Over the same packed weights: made by the first, mapped by the second."""

    two_threads: ModelRunner
    one_thread: ModelRunner


def make(model: str, quantize: str, num_threads: int, cache: Path) -> ModelRunner:
    source = resolve(model, allow_pull=False)
    config = EngineConfig(
        model=ModelConfig(model=model, quantize=quantize, weights_cache=str(cache)),  # type: ignore[arg-type]
        cache=CacheConfig(num_pages=NUM_PAGES),
        platform=PlatformConfig(platform="native", num_threads=num_threads),
    )
    return PLATFORM.create_runner(source.arch(), source.tensors(), config, 1024, Sampler()).runner


@pytest.fixture(scope="session")
def runners(setting: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runners]:
    cache = tmp_path_factory.mktemp("packed")
    made = Runners(make(*setting, 2, cache), make(*setting, 1, cache))
    yield made
    made.two_threads.close()
    made.one_thread.close()
    shutil.rmtree(cache)  # gigabytes together, which pytest would keep for three runs


def digests(runner: ModelRunner, counts: Sequence[int], num_others: int = 0) -> Rows:
    """Every row of the prompt, computed in steps of these counts; the others decode beside it."""
    driver = Driver(runner, NUM_PAGES)
    target = driver.new(PROMPT)
    others = [driver.new(tokens) for tokens in COMPANY[:num_others]]
    found: Rows = {}

    def tap(seq_id: int, position: int, logits: np.ndarray) -> None:
        if seq_id == target.seq_id:
            assert position not in found
            found[position] = hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()

    runner.logits_tap = tap
    for count in counts:
        driver.step(*[(o, 1) for o in others], (target, count))
    assert len(found) == len(PROMPT)
    return found


@pytest.fixture(scope="session")
def alone(runners: Runners) -> Rows:
    return digests(runners.two_threads, [len(PROMPT)])


def programs_of(runner: ModelRunner) -> Programs:
    assert isinstance(runner.programs, Programs)
    return runner.programs


@pytest.mark.parametrize("counts", WAYS.values(), ids=WAYS)
def test_every_way_through_the_prompt_has_the_same_bits(runners: Runners, alone: Rows, counts) -> None:
    assert digests(runners.two_threads, counts) == alone


@pytest.mark.parametrize("num_others", [1, 7, 31, 63])
def test_batches_of_up_to_64_change_no_bit(runners: Runners, alone: Rows, num_others: int) -> None:
    assert digests(runners.two_threads, [64, 50, *[1] * 36], num_others) == alone


@pytest.mark.parametrize("counts", [[150], [100, *[1] * 50]], ids=["whole", "decode"])
def test_one_thread_over_mapped_weights_changes_no_bit(runners: Runners, alone: Rows, counts) -> None:
    assert digests(runners.one_thread, counts) == alone


@pytest.mark.parametrize("counts", [[150], [100, *[1] * 50]], ids=["whole", "decode"])
def test_without_programs_no_bit_changes(
    runners: Runners, alone: Rows, counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners.two_threads, "programs", None)
    assert digests(runners.two_threads, counts) == alone


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_stop_at_a_layer_changes_no_bit(runners: Runners, alone: Rows, share: float) -> None:
    programs, seen = programs_of(runners.two_threads), []
    digests(runners.two_threads, [len(PROMPT)])
    num_layers = programs.control.finished_layers
    layer = max(1, round(share * num_layers))
    assert num_layers > 1
    programs.on_stop = seen.append
    programs.control.stop_after = layer
    try:
        found = digests(runners.two_threads, [64, 60, *[1] * 26], 7)
    finally:
        programs.control.stop_after, programs.on_stop = 0, None
    assert found == alone
    assert seen == [layer] * 28
