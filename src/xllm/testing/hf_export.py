"""A resolved Llama or Qwen2 model as a Hugging Face directory: what oracles and other engines load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from xllm.arch import ArchConfig
from xllm.artifacts.source import Array, FloatArray, ModelSource
from xllm.artifacts.write import write_hf_dir

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def export_hf(source: ModelSource, directory: Path, dtype: str = "float32") -> Path:
    """Write the dequantised weights, config and tokenizer; the directory.

    `dtype` is float32 or bfloat16 (rounded to nearest even). Raises ValueError for another one and for
    architectures beyond Llama and Qwen2.
    """
    arch = source.arch()
    tensors = source.tensors()
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"cannot export as {dtype}")
    encode = bfloat16_bits if dtype == "bfloat16" else _unchanged
    write_hf_dir(
        directory,
        _config(arch, dtype),
        {name: encode(tensors.load_f32(name)) for name in tensors.names()},
        source.assets(),
    )
    path = directory / "tokenizer_config.json"
    # Named, or AutoTokenizer would rebuild the pre-tokenizer it believes the model to have.
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return directory


def _unchanged(values: FloatArray) -> Array:
    return values


def bfloat16_bits(values: FloatArray) -> Array:
    """Upper halves of finite float32, rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _config(arch: ArchConfig, dtype: str) -> dict[str, object]:
    if arch.name not in _CLASSES or arch.rope_scaling is not None:
        raise ValueError(f"cannot export {arch.name}")
    return {
        "model_type": arch.name,
        "architectures": [_CLASSES[arch.name]],
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
        "torch_dtype": dtype,
    }
