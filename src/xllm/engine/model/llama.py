"""Llama: SmolLM2, Llama 2 and 3, Mistral (windowed layers through the KV group). Pre-norm, GQA, SwiGLU.

Plain functions over `ops`; no torch, no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xllm.arch import ArchConfig
from xllm.engine.kernels.ops import Batch, Buffer, KVPages, Ops, RopeTable
from xllm.engine.model.definition import LoadedWeights, ModelDefinition, Param
from xllm.engine.model.params import decoder_params
from xllm.engine.model.rope import arch_ropes


def parameters(arch: ArchConfig) -> Sequence[Param]:
    return decoder_params(arch, ("input_layernorm", "post_attention_layernorm"))


def forward(ops: Ops, arch: ArchConfig, weights: LoadedWeights, kv: KVPages, batch: Batch) -> Buffer:
    """One step → normed hidden states (R, D) of the rows that yield logits."""
    rope = ops.rope_rows(weights.ropes["full"], batch.positions)
    x = ops.embedding(batch.token_ids, weights.top["embed"])
    for layer, w in enumerate(weights.layers):
        h = ops.rms_norm(x, w["input_layernorm"], arch.rms_norm_eps)
        x = ops.add(x, attention(ops, arch, w, kv, batch, layer, h, rope))
        h = ops.rms_norm(x, w["post_attention_layernorm"], arch.rms_norm_eps)
        x = ops.add(x, mlp(ops, w, h))
        ops.end_layer(layer)
    return ops.rms_norm(ops.select_rows(x, batch.logit_rows), weights.top["norm"], arch.rms_norm_eps)


def attention(
    ops: Ops,
    arch: ArchConfig,
    w: Mapping[str, Buffer],
    kv: KVPages,
    batch: Batch,
    layer: int,
    h: Buffer,
    rope: RopeTable,
) -> Buffer:
    """(T, D) → (T, D); heads are normed before rotation where the layer has `q_norm`."""
    q_width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    qkv = ops.linear(h, w["qkv"], w.get("qkv_bias"))
    q, k, v = ops.split_columns(qkv, (q_width, kv_width, kv_width))
    if "q_norm" in w:
        q = ops.rms_norm(q, w["q_norm"], arch.rms_norm_eps)
        k = ops.rms_norm(k, w["k_norm"], arch.rms_norm_eps)
    group, index = kv.place[layer]
    out = ops.attention(
        ops.rope(q, rope),
        ops.rope(k, rope),
        v,
        kv.groups[group],
        index,
        batch.attention[group],
        scale=arch.head_dim**-0.5 if arch.query_scale is None else arch.query_scale,
        softcap=arch.attn_logit_softcap,
    )
    return ops.all_reduce(ops.linear(out, w["o"], w.get("o_bias")))


def mlp(ops: Ops, w: Mapping[str, Buffer], h: Buffer) -> Buffer:
    """(T, D) → (T, D): down(silu(gate) · up)."""
    gate_up = ops.linear(h, w["gate_up"], w.get("gate_up_bias"))
    return ops.all_reduce(ops.linear(ops.silu_mul(gate_up), w["down"], w.get("down_bias")))


def head(ops: Ops, arch: ArchConfig, weights: LoadedWeights, hidden: Buffer) -> Buffer:
    """(R, D) → logits (R, V)."""
    logits = ops.all_gather(ops.linear(hidden, weights.top["head"]))
    return logits if arch.final_logit_softcap is None else ops.softcap(logits, arch.final_logit_softcap)


DEFINITION = ModelDefinition(parameters=parameters, ropes=arch_ropes, forward=forward, head=head)
