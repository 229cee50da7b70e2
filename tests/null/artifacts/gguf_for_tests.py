"""Makes small GGUF files with the `gguf` library's writer, independent of our reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Quant

from xllm.testing.tiny_tokenizer import tiny_assets


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, Quant]],
    arch: str = "llama",
    extra: Mapping[str, Any] | None = None,
    **numbers: Any,
) -> Path:
    """`tensors`: name → (float32 values, type to store), or (uint8 blocks, block type) as they are."""
    writer = gguf.GGUFWriter(path, arch)
    fields = {"context_length": 128, "embedding_length": 64, "block_count": 1, "feed_forward_length": 128}
    fields |= {"attention.head_count": 4, "attention.head_count_kv": 2, **numbers}
    for key, value in fields.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        (writer.add_string if isinstance(value, str) else add)(f"{arch}.{key}", value)
    if "attention.layer_norm_rms_epsilon" not in numbers:
        writer.add_layer_norm_rms_eps(1e-5)
    for key, value in (extra or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    for name, (values, kind) in tensors.items():
        data = values if values.dtype == np.uint8 else gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(seed: int = 0) -> dict[str, tuple[np.ndarray, Quant]]:
    """The tensors of a one-layer Llama, 64 wide, 4 heads of 16, 2 KV heads, 32 tokens, in GGUF's names."""
    generator = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (32, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (128, 64),
        "blk.0.ffn_up.weight": (128, 64),
        "blk.0.ffn_down.weight": (64, 128),
    }
    return {n: (generator.standard_normal(s, dtype=np.float32), Quant.F32) for n, s in shapes.items()}


def tokenizer_keys(pre: str = "gpt-2") -> dict[str, Any]:
    """`tokenizer.ggml.*` of the tiny tokenizer."""
    spec = json.loads(tiny_assets(300)["tokenizer"])
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": spec["model"]["merges"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
