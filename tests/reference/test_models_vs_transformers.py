"""Each architecture against transformers on the same random weights: logits within 1e-4 of max |logit|.

The prompt is computed in one piece, in chunks, and token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.reference.runner_driver import DictTensors, Driver, make_runner
from xllm.arch import ArchConfig
from xllm.artifacts.hf_arch import arch_from_config

torch = pytest.importorskip("torch", reason="the reference platform needs the extra xllm[torch]")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

NUM_TOKENS = 150
TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Case:
    config: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM"),
    "llama-tied": Case("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": Case("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": Case("LlamaConfig", "LlamaForCausalLM", {"rope_scaling": LLAMA3}),
    "linear-rope": Case(
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "yarn": Case("Qwen2Config", "Qwen2ForCausalLM", {"rope_scaling": YARN}),
    "mistral-window": Case("MistralConfig", "MistralForCausalLM", {"sliding_window": 40}),
    "qwen2": Case("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma3": Case(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "sliding_window": 40,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"],
        },
    ),
}


@dataclass(frozen=True)
class Oracle:
    arch: ArchConfig
    tensors: DictTensors
    tokens: list[int]
    logits: np.ndarray


@pytest.fixture(scope="module", params=list(CASES))
def oracle(request: pytest.FixtureRequest) -> Oracle:
    case = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**{**TINY, **case.extra})
    config._attn_implementation = "eager"
    model = getattr(transformers, case.model)(config).eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # their initial values would hide an omission
            parameter.data += 0.3 * torch.randn_like(parameter)
    stored = model.state_dict()
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight")
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, TINY["vocab_size"], NUM_TOKENS)]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    settings = {**config.to_dict(), "architectures": [case.model]}
    arch = arch_from_config(settings, {})
    return Oracle(arch, DictTensors({n: t.numpy() for n, t in stored.items()}), tokens, logits)


@pytest.mark.parametrize("chunk", [None, 64, 17, 1], ids=lambda c: f"chunk={c}")
def test_logits_equal_transformers(oracle: Oracle, chunk: int | None) -> None:
    driver = Driver(make_runner(oracle.arch, oracle.tensors))
    logits = driver.prefill(driver.new(oracle.tokens), chunk).rows()
    assert logits.shape == oracle.logits.shape
    assert np.abs(logits - oracle.logits).max() <= 1e-4 * np.abs(oracle.logits).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision_stays_near(oracle: Oracle, dtype: str, tolerance: float) -> None:
    driver = Driver(make_runner(oracle.arch, oracle.tensors, dtype))
    logits = driver.prefill(driver.new(oracle.tokens)).rows()
    error = np.sqrt(np.mean((logits - oracle.logits) ** 2) / np.mean(oracle.logits**2))
    assert error <= tolerance
