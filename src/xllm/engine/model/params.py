"""Parameter declarations that architectures have in common; fused where one product serves several."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.arch import ArchConfig
from xllm.engine.model.definition import Param


def decoder_params(arch: ArchConfig, norms: Sequence[str], *, qk_norm: bool = False) -> list[Param]:
    """Embedding, head, final norm, and per layer qkv, o, gate_up, down (with biases as configured),
    the `norms` over D named as in the checkpoint, and per-head q_norm / k_norm."""
    hidden, vocab = arch.hidden_size, arch.vocab_size
    embed = ("model.embed_tokens.weight",)
    params = [Param(key="embed", sources=embed, shapes=((vocab, hidden),), kind="table", pad_rows=True)]
    if not arch.tie_word_embeddings:
        params.append(matrix("head", ("lm_head.weight",), ((vocab, hidden),), pad_rows=True))
    params.append(vector("norm", ("model.norm.weight",), ((hidden,),)))
    for layer in range(arch.num_layers):
        params += _attention(arch, layer) + _mlp(arch, layer)
        prefix = f"model.layers.{layer}."
        params += [vector(n, (f"{prefix}{n}.weight",), ((hidden,),), layer) for n in norms]
        if qk_norm:
            names = ("q_norm", "k_norm")
            params += [
                vector(n, (f"{prefix}self_attn.{n}.weight",), ((arch.head_dim,),), layer) for n in names
            ]
    return params


def matrix(
    key: str,
    sources: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    layer: int | None = None,
    *,
    pad_rows: bool = False,
) -> Param:
    return Param(key=key, sources=sources, shapes=shapes, kind="matrix", layer=layer, pad_rows=pad_rows)


def vector(
    key: str, sources: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], layer: int | None = None
) -> Param:
    return Param(key=key, sources=sources, shapes=shapes, kind="vector", layer=layer)


def _attention(arch: ArchConfig, layer: int) -> list[Param]:
    base = f"model.layers.{layer}.self_attn."
    q_width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    widths = (q_width, kv_width, kv_width)
    qkv = tuple(f"{base}{n}_proj" for n in "qkv")
    hidden = arch.hidden_size
    params = [
        matrix("qkv", tuple(f"{n}.weight" for n in qkv), tuple((w, hidden) for w in widths), layer),
        matrix("o", (f"{base}o_proj.weight",), ((hidden, q_width),), layer),
    ]
    if arch.attention_bias:
        params.append(vector("qkv_bias", tuple(f"{n}.bias" for n in qkv), tuple((w,) for w in widths), layer))
    if arch.attention_out_bias:
        params.append(vector("o_bias", (f"{base}o_proj.bias",), ((hidden,),), layer))
    return params


def _mlp(arch: ArchConfig, layer: int) -> list[Param]:
    base = f"model.layers.{layer}.mlp."
    hidden, inner = arch.hidden_size, arch.intermediate_size
    gate_up = (f"{base}gate_proj", f"{base}up_proj")
    params = [
        matrix("gate_up", tuple(f"{n}.weight" for n in gate_up), ((inner, hidden),) * 2, layer),
        matrix("down", (f"{base}down_proj.weight",), ((hidden, inner),), layer),
    ]
    if arch.mlp_bias:
        params.append(vector("gate_up_bias", tuple(f"{n}.bias" for n in gate_up), ((inner,),) * 2, layer))
        params.append(vector("down_bias", (f"{base}down_proj.bias",), ((hidden,),), layer))
    return params
