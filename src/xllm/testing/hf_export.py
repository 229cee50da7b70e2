"""A resolved Llama model as a Hugging Face directory with float32 weights: what oracles load."""

from __future__ import annotations

import json
from pathlib import Path

from xllm.arch import ArchConfig
from xllm.artifacts.source import ModelSource
from xllm.artifacts.write import write_hf_dir


def export_hf(source: ModelSource, directory: Path) -> Path:
    """Write the dequantised weights, config and tokenizer; the directory. Llama only (ValueError)."""
    arch = source.arch()
    tensors = source.tensors()
    write_hf_dir(
        directory, _llama_config(arch), {n: tensors.load_f32(n) for n in tensors.names()}, source.assets()
    )
    path = directory / "tokenizer_config.json"
    # Named, or AutoTokenizer would rebuild the pre-tokenizer it believes a Llama to have.
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return directory


def _llama_config(arch: ArchConfig) -> dict[str, object]:
    if arch.name != "llama" or arch.rope_scaling is not None:
        raise ValueError(f"cannot export {arch.name}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "max_position_embeddings": arch.max_position,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "hidden_act": arch.activation,
        "bos_token_id": arch.bos_token_id,
        "eos_token_id": list(arch.eos_token_ids),
        "torch_dtype": "float32",
    }
