"""lm-eval's local-completions (echo + logprobs) scores us as it scores transformers on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from xllm.artifacts.resolve import resolve
from xllm.testing.hf_export import export_hf
from xllm.testing.server_process import ServerProcess

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def hf_dir(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's dequantised weights and tokenizer as a Hugging Face directory."""
    return export_hf(resolve(smollm2), tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    directory = tmp_path_factory.mktemp("tasks")
    text = (TASKS / "capitals.yaml").read_text()
    data = {"dataset_kwargs": {"data_files": {"test": str(TASKS / "capitals.jsonl")}}}
    (directory / "capitals.yaml").write_text(
        text + "dataset_kwargs: " + json.dumps(data["dataset_kwargs"]) + "\n"
    )
    return TaskManager(include_path=str(directory), include_defaults=False)


class TransformersLM(LM):
    """Log-likelihoods straight from transformers, in float32."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def loglikelihood(self, requests):
        return [self._score(*r.args) for r in requests]

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        # The same split as lm-eval's API models: the continuation's tokens are those that follow
        # the context's own tokens in the whole.
        whole = self.tokenizer.encode(context + continuation)
        start = len(self.tokenizer.encode(context))
        with torch.no_grad():
            rows = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)[start - 1 : -1]
        targets = torch.tensor(whole[start:])
        greedy = bool((rows.argmax(-1) == targets).all())
        return float(rows.gather(1, targets[:, None]).sum()), greedy

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def evaluate(task_manager: TaskManager, **model) -> tuple[float, list[tuple[float, bool]]]:
    results = simple_evaluate(
        **model, tasks=["xllm_capitals"], task_manager=task_manager, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(results["samples"]["xllm_capitals"], key=lambda s: s["doc_id"])
    # The API model reports strings; both as (log-likelihood, is greedy).
    scores = [(float(lp), str(g) == "True") for s in samples for lp, g in s["filtered_resps"]]
    return results["results"]["xllm_capitals"]["acc,none"], scores


@pytest.mark.slow
def test_the_score_equals_transformers(
    reference_server: ServerProcess, hf_dir: Path, task_manager: TaskManager
) -> None:
    ours, our_scores = evaluate(
        task_manager,
        model="local-completions",
        model_args={
            "model": "smollm2",
            "base_url": f"{reference_server.base_url}/v1/completions",
            "tokenizer": str(hf_dir),
            "num_concurrent": 4,
            "max_retries": 1,
        },
    )
    theirs, their_scores = evaluate(task_manager, model=TransformersLM(hf_dir))
    assert ours == theirs
    assert len(our_scores) == len(their_scores) == 24 * 4
    for (our_lp, our_greedy), (their_lp, their_greedy) in zip(our_scores, their_scores, strict=True):
        assert our_lp == pytest.approx(their_lp, abs=2e-3)
        assert our_greedy == their_greedy
