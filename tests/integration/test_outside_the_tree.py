"""A platform, a model, a router policy, an order and a logits processor of another package, by entry point.

The package `outside/` is not installed, only put on the path of the server's processes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx
import numpy as np
import pytest

from xllm.artifacts.write import write_hf_dir
from xllm.testing.server_process import ServerProcess, serve
from xllm.testing.tiny_tokenizer import tiny_assets

OUTSIDE = Path(__file__).parent / "outside"
CONFIG = {
    "model_type": "outside",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_hf_dir(tmp_path / "outside", CONFIG, {"unused": np.zeros((1,), np.float32)}, tiny_assets(512))
    return tmp_path / "outside"


def start(model_dir: Path, *args: str):
    env = {**os.environ, "PYTHONPATH": str(OUTSIDE)}
    return serve(str(model_dir), "--load-format", "dummy", "--num-pages", "32", *args, env=env)


def complete(server: ServerProcess, **fields) -> dict:
    body = {"model": "outside", "prompt": "abc", "max_tokens": 5, "return_token_ids": True, **fields}
    answer = httpx.post(
        f"{server.base_url}/v1/completions",
        content=json.dumps(body),
        timeout=60,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_model_processor_policy_and_order_load(model_dir: Path) -> None:
    with start(
        model_dir, "--logits-processors", "outside-only", "--router-policy", "outside-last",
        "--scheduling-policy", "outside-shortest", "--dtype", "float32",
    ) as server:  # fmt: skip
        assert complete(server, ignore_eos=True)["token_ids"] == [77] * 5


def test_the_platform_loads(model_dir: Path) -> None:
    with start(model_dir, "--platform", "outside") as server:
        assert len(complete(server, ignore_eos=True)["token_ids"]) == 5
        assert any("platform outside ready" in line for line in server.lines)


def test_an_unknown_name_ends_with_the_known_ones(model_dir: Path) -> None:
    with pytest.raises(RuntimeError, match="outside-only"), start(model_dir, "--logits-processors", "nobody"):
        pass
