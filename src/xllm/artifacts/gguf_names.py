"""GGUF tensor names to Hugging Face names. Tables and nothing else."""

from __future__ import annotations

import re

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Gemma has four norms per layer, so the feed-forward one is not the norm after attention.
_GEMMA_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")

ROPE_FREQS = "rope_freqs.weight"
"""Not a parameter: the frequency factors of Llama 3.1, turned into `RopeScaling` by the reader."""


def hf_name(gguf_name: str, arch_name: str) -> str | None:
    """The Hugging Face name of a tensor of `arch_name`, None when it has no such parameter."""
    if gguf_name in _TOP:
        return _TOP[gguf_name]
    match = _BLOCK.fullmatch(gguf_name)
    table = _GEMMA_LAYER if arch_name == "gemma3" else _LAYER
    if match is None or match[2] not in table:
        return None
    return f"model.layers.{int(match[1])}.{table[match[2]]}.{match[3]}"
