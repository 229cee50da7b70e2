"""A decoder architecture as numbers: the noun between `artifacts` (files) and `engine.model` (maths).

Names follow Hugging Face's config.json. Plain values; no reading of files, no maths.
"""

from __future__ import annotations

import msgspec


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Scaling of rotary frequencies. `kind`: linear, llama3 (Llama 3.1), yarn (arXiv 2309.00071).

    Fields not used by a kind keep their defaults.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ArchConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One decoder-only transformer.

    `name` is the key of the model registry (llama, mistral, qwen2, qwen3, gemma3).
    `layer_windows[i]` is layer i's sliding window in tokens (a row sees positions > p − window),
    None = full attention. `local_rope_theta` is the base of windowed layers where it differs.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    query_scale: float | None = None
    """Factor on q·k; None = head_dim ** −0.5."""
    attn_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "float32"
