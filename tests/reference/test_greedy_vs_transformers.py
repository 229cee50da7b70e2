"""SmolLM2 greedy, float32: the tokens of transformers on the same dequantised weights, 24 prompts × 64.

A difference is allowed only where transformers' own two best logits are closer than 1e-4; it is printed,
ends the comparison of that prompt, and at most two may occur.
"""

from __future__ import annotations

import pytest

from tests.reference.runner_driver import Driver, make_runner
from xllm.artifacts.resolve import resolve
from xllm.engine.kernels.ops import F32
from xllm.engine.model.weights import Tensors
from xllm.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="the reference platform needs the extra xllm[torch]")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

NUM_TOKENS = 64
NEAR_TIE = 1e-4
MAX_NEAR_TIES = 2
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "Q: What is 17 + 25?\nA:",
    "In 1969, the first humans",
    "Water boils at",
    "A recipe for pancakes: first,",
    "import numpy as np\n\n",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "Die Hauptstadt von Deutschland ist",
    "List three primary colours:\n1.",
    "She opened the door and saw",
    "The mitochondria is",
    "SELECT name FROM users WHERE",
    "To be, or not to be,",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nExplain recursion in one sentence.<|im_end|>\n<|im_start|>assistant\n",
    "Numbers: 1, 1, 2, 3, 5, 8,",
    "The history of the Roman Empire " * 12,
    "x",
)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_greedy_tokens_equal_transformers(smollm2: str) -> None:
    source = resolve(smollm2)
    tensors, arch = source.tensors(), source.arch()
    assets = source.assets()
    tokenizer = Tokenizer(assets["tokenizer"], {})
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    ours = greedy(make_runner(arch, tensors, num_pages=128), prompts)
    oracle = oracle_of(arch, tensors)
    near_ties = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        near_ties += near_ties_of(oracle, prompt, tokens)
    assert near_ties <= MAX_NEAR_TIES


def greedy(runner, prompts: list[list[int]]) -> list[list[int]]:
    """NUM_TOKENS tokens for each prompt, all prompts decoded together."""
    driver = Driver(runner, 128)
    seqs = [driver.new(prompt) for prompt in prompts]
    runner.logits_tap = None
    for seq in seqs:
        driver.step((seq, len(seq.tokens)), sample=True)
    for _ in range(NUM_TOKENS - 1):
        driver.step(*[(seq, 1) for seq in seqs], sample=True)
    return [seq.tokens[len(prompt) :] for seq, prompt in zip(seqs, prompts, strict=True)]


def near_ties_of(oracle, prompt: list[int], tokens: list[int]) -> int:
    """0 if the oracle would greedily choose `tokens`, 1 if they part at a near tie; fails otherwise.

    One forward pass over prompt and tokens: position by position the oracle's choice given the same
    prefix, so equality up to a position is equality of the two greedy runs up to it.
    """
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2)
    for offset, token in enumerate(tokens):
        if int(best.indices[offset, 0]) == token:
            continue
        gap = float(best.values[offset, 0] - best.values[offset, 1])
        print(f"offset {offset}: {token}, not {int(best.indices[offset, 0])}; the oracle's gap is {gap:.2e}")
        assert gap < NEAR_TIE
        return 1
    return 0


def oracle_of(arch, tensors: Tensors):
    """transformers' model with our dequantised weights."""
    config = transformers.LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        rms_norm_eps=arch.rms_norm_eps,
        rope_theta=arch.rope_theta,
        max_position_embeddings=arch.max_position,
        tie_word_embeddings=arch.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float().eval()
    values: dict[str, F32] = {name: tensors.load_f32(name) for name in tensors.names()}
    missing, unexpected = model.load_state_dict({n: torch.tensor(v) for n, v in values.items()}, strict=False)
    assert missing == ["lm_head.weight"] * arch.tie_word_embeddings
    assert not unexpected
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were not in the weights
    return model
