"""GGUF metadata to `ArchConfig`. Numbers only; tensors are `gguf_file`, tokenizers `gguf_tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm.arch import ArchConfig, RopeScaling
from xllm.artifacts.gguf_header import GgufError
from xllm.artifacts.source import FloatArray

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")

_GEMMA_PERIOD = 6
_GEMMA_LOCAL_THETA = 10_000.0
_GEMMA_27B_LAYERS = 62

# Texts that end a turn; GGUF names one EOS although chat models stop at any of these.
_END_TEXTS = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>"}
)
_CONTROL = 3


def arch_from_metadata(
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    tied: bool,
    has_bias: bool,
    rope_freqs: FloatArray | None,
) -> ArchConfig:
    """`vocab_size`: rows of the embedding. `tied`: there is no output matrix. `has_bias`: q, k and v
    have biases. Raises GgufError."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise GgufError(f"architecture {str(name)[:40]} is not supported; {', '.join(ARCHITECTURES)} are")
    m = _Fields(metadata, name)
    hidden, num_heads, num_layers = (
        m.integer("embedding_length"),
        m.integer("attention.head_count"),
        m.integer("block_count"),
    )
    head_dim = m.integer("attention.key_length", hidden // num_heads)
    if m.integer("attention.value_length", head_dim) != head_dim:
        raise GgufError("keys and values of different length are not supported")
    if m.integer("rope.dimension_count", head_dim) != head_dim:
        raise GgufError("partial rotary embedding is not supported")
    gemma = name == "gemma3"
    context = m.integer("context_length")
    return ArchConfig(
        name=name,
        hidden_size=hidden,
        intermediate_size=m.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=m.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=_short_float(m.number("attention.layer_norm_rms_epsilon")),
        rope_theta=m.number("rope.freq_base", 1_000_000.0 if gemma else 10_000.0),
        max_position=context,
        tie_word_embeddings=tied,
        layer_windows=_windows(m, name, num_layers),
        rope_scaling=_rope_scaling(m, context, head_dim, rope_freqs),
        local_rope_theta=_GEMMA_LOCAL_THETA if gemma else None,
        attention_bias=has_bias,
        activation="gelu_pytorch_tanh" if gemma else "silu",
        # Gemma's 27B divides by the width per head, every other size by the head dimension.
        query_scale=(hidden / num_heads) ** -0.5 if gemma and num_layers == _GEMMA_27B_LAYERS else None,
        final_logit_softcap=m.optional("final_logit_softcapping"),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=eos_ids(metadata),
        torch_dtype="float32",
    )


def eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """EOS first, then end-of-turn ids and control tokens known to end a turn."""
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    pairs = enumerate(zip(tokens, types, strict=False))
    ids += [i for i, (token, kind) in pairs if kind == _CONTROL and token in _END_TEXTS]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


class _Fields:
    """Typed access to `<arch>.<key>`."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self._metadata = metadata
        self._name = name

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self._name}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise GgufError(f"{key} is missing or not a single positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise GgufError(f"{key} is missing or not a positive number")
        return float(value)

    def optional(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)


def _short_float(value: float) -> float:
    """The decimal a float32 was written from (1e-5, not 9.999999747378752e-06), as config.json has it."""
    return float(np.format_float_positional(np.float32(value), unique=True))


def _windows(m: _Fields, name: str, num_layers: int) -> tuple[int | None, ...]:
    window = m.get("attention.sliding_window")
    if not window:
        return (None,) * num_layers
    window = m.integer("attention.sliding_window")
    if name == "gemma3":
        return tuple(None if (i + 1) % _GEMMA_PERIOD == 0 else window for i in range(num_layers))
    return (window,) * num_layers


def _rope_scaling(
    m: _Fields, context: int, head_dim: int, rope_freqs: FloatArray | None
) -> RopeScaling | None:
    if rope_freqs is not None:
        return _llama3_scaling(rope_freqs, m.number("rope.freq_base", 10_000.0), head_dim)
    kind = m.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    factor = m.number("rope.scaling.factor", 1.0)
    original = m.integer("rope.scaling.original_context_length", context)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=m.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=m.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=m.optional("rope.scaling.attn_factor"),
        )
    raise GgufError("rope scaling of this type is not supported; none, linear, yarn and llama3 are")


def _llama3_scaling(freqs: FloatArray, theta: float, head_dim: int) -> RopeScaling | None:
    """The Llama 3.1 parameters that make exactly these frequency factors.

    GGUF stores the factors, not the parameters. Every Llama 3 release uses low 1, high 4 and 8192
    positions; only the factor differs, and it is the largest entry.
    """
    if freqs.shape != (head_dim // 2,):
        raise GgufError("rope_freqs does not have one entry per frequency")
    factor = float(freqs.max())
    if factor == 1.0:
        return None
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    if not np.allclose(freqs, llama3_factors(scaling, theta, head_dim), rtol=1e-4):
        raise GgufError("rope_freqs are not those of Llama 3; use the Hugging Face directory of the model")
    return scaling


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> FloatArray:
    """What each inverse frequency is divided by, float32[head_dim / 2]."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_position * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / scaling.factor + smooth)).astype(np.float32)
