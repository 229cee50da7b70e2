"""Which parameters an architecture has, by Hugging Face name and shape. Derived from numbers only."""

from __future__ import annotations

from xllm.arch import ArchConfig

Shape = tuple[int, ...]


def parameter_shapes(arch: ArchConfig) -> dict[str, Shape]:
    """Name → shape of every parameter of the unquantised model, linears as (out, in)."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size)}
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        shapes.update({prefix + name: shape for name, shape in _layer_shapes(arch).items()})
    shapes["model.norm.weight"] = (arch.hidden_size,)
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    return shapes


def _layer_shapes(arch: ArchConfig) -> dict[str, Shape]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if arch.attention_bias:
        shapes["self_attn.q_proj.bias"] = (q_size,)
        shapes["self_attn.k_proj.bias"] = (kv_size,)
        shapes["self_attn.v_proj.bias"] = (kv_size,)
    if arch.attention_out_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if arch.mlp_bias:
        shapes["mlp.gate_proj.bias"] = (inner,)
        shapes["mlp.up_proj.bias"] = (inner,)
        shapes["mlp.down_proj.bias"] = (hidden,)
    if arch.name in ("qwen3", "gemma3"):
        shapes["self_attn.q_norm.weight"] = (arch.head_dim,)
        shapes["self_attn.k_norm.weight"] = (arch.head_dim,)
    if arch.name == "gemma3":
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes
