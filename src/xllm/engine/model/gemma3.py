"""Gemma 3 text: norms before and after each block, QK norm, GeGLU, windowed layers with their own base.

All norms multiply by 1 + w. Plain functions over `ops`; no torch, no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xllm.arch import ArchConfig
from xllm.engine.kernels.ops import Batch, Buffer, KVPages, Ops, RopeTable
from xllm.engine.model.definition import LoadedWeights, ModelDefinition, Param
from xllm.engine.model.llama import head
from xllm.engine.model.params import decoder_params
from xllm.engine.model.rope import arch_ropes

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def parameters(arch: ArchConfig) -> Sequence[Param]:
    return decoder_params(arch, _NORMS, qk_norm=True)


def forward(ops: Ops, arch: ArchConfig, weights: LoadedWeights, kv: KVPages, batch: Batch) -> Buffer:
    """One step → normed hidden states (R, D) of the rows that yield logits."""
    ropes = {name: ops.rope_rows(table, batch.positions) for name, table in weights.ropes.items()}
    local = ropes.get("local", ropes["full"])
    x = ops.embedding(batch.token_ids, weights.top["embed"], scale=arch.hidden_size**0.5)
    for layer, w in enumerate(weights.layers):
        rope = ropes["full"] if arch.layer_windows[layer] is None else local
        h = _norm(ops, arch, x, w["input_layernorm"])
        h = _attention(ops, arch, w, kv, batch, layer, h, rope)
        x = ops.add(x, _norm(ops, arch, h, w["post_attention_layernorm"]))
        h = _norm(ops, arch, x, w["pre_feedforward_layernorm"])
        h = ops.linear(ops.gelu_tanh_mul(ops.linear(h, w["gate_up"])), w["down"])
        x = ops.add(x, _norm(ops, arch, ops.all_reduce(h), w["post_feedforward_layernorm"]))
        ops.end_layer(layer)
    return _norm(ops, arch, ops.select_rows(x, batch.logit_rows), weights.top["norm"])


def _attention(
    ops: Ops,
    arch: ArchConfig,
    w: Mapping[str, Buffer],
    kv: KVPages,
    batch: Batch,
    layer: int,
    h: Buffer,
    rope: RopeTable,
) -> Buffer:
    q_width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    qkv = ops.linear(h, w["qkv"], w.get("qkv_bias"))
    q, k, v = ops.split_columns(qkv, (q_width, kv_width, kv_width))
    q, k = _norm(ops, arch, q, w["q_norm"]), _norm(ops, arch, k, w["k_norm"])
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


def _norm(ops: Ops, arch: ArchConfig, x: Buffer, weight: Buffer) -> Buffer:
    return ops.rms_norm(x, weight, arch.rms_norm_eps, weight_offset=1.0)


DEFINITION = ModelDefinition(parameters=parameters, ropes=arch_ropes, forward=forward, head=head)
