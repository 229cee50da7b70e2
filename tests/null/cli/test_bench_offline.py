"""`xllm bench throughput|latency`: what is asked of the engine and what is made of its answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm.cli.bench import offline
from xllm.cli.main import main
from xllm.types import SamplingParams


@dataclass
class Engine:
    """Answers every prompt with `max_tokens` tokens and remembers what it was asked."""

    calls: list[tuple[list[str], SamplingParams]] = field(default_factory=list)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: list[str], params: SamplingParams, *, use_tqdm: bool) -> list[Any]:
        self.calls.append((prompts, params))
        output = SimpleNamespace(token_ids=(1,) * (params.max_tokens or 0))
        return [SimpleNamespace(prompt_token_ids=(1, 2, 3), outputs=[output]) for _ in prompts]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(offline, "_start", lambda args: engine)
    return engine


def test_throughput_counts_prompt_and_output_tokens(engine: Engine, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    words = ["bench", "throughput", "m", "--num-prompts", "5", "--output-len", "4", "--json", str(result)]
    assert main(words) == 0
    data = json.loads(result.read_text())
    assert data["total_num_tokens"] == 5 * (3 + 4)
    assert data["num_requests"] == 5
    assert data["tokens_per_second"] * data["elapsed_time"] == pytest.approx(35)
    assert data["output_tokens_per_second"] * data["elapsed_time"] == pytest.approx(20)


def test_lengths_are_fixed_and_no_prompt_comes_twice(engine: Engine, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    words = ["bench", "latency", "m", "--batch-size", "2", "--num-iters", "3", "--input-len", "6"]
    assert main([*words, "--json", str(result)]) == 0
    prompts = [prompt for asked, _ in engine.calls for prompt in asked]
    assert len(prompts) == len(set(prompts)) == 2 * 4
    assert {len(prompt.split()) for prompt in prompts} == {6}
    assert all(params.ignore_eos and params.temperature == 0 for _, params in engine.calls)
    # One warm-up is not measured.
    assert len(json.loads(result.read_text())["latencies"]) == 3


@pytest.mark.parametrize("words", [["--batch-size", "0"], ["--num-iters", "0"]])
def test_impossible_sizes_are_refused(
    engine: Engine, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", "m", *words]) == 2
    assert "--batch-size" in capsys.readouterr().err
