"""Hugging Face's config.json to `ArchConfig`. What is not understood is refused by name, not ignored."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from xllm.arch import ArchConfig, RopeScaling
from xllm.errors import ConfigError

MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}

# Where a text config leaves out what transformers defaults to, per model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True, "rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 128, "rms_norm_eps": 1e-6},
    "gemma3": {
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
}


def arch_from_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ArchConfig:
    """`generation` is generation_config.json ({} if absent); its EOS ids win. Raises ConfigError."""
    model_type = str(config.get("model_type"))
    known = {**MODEL_TYPES, **{entry.name: entry.name for entry in entry_points(group="xllm.models")}}
    if model_type not in known:
        raise ConfigError(
            f"config.json: model_type {model_type[:40]} is not supported; {', '.join(known)} are"
        )
    if "quantization_config" in config:
        raise ConfigError("config.json: quantized checkpoints are not supported; take the original or a GGUF")
    name = known[model_type]
    outer = config
    if isinstance(config.get("text_config"), dict):
        config = {**config["text_config"]}
    fields = _Fields({**_DEFAULTS.get(name, {}), **{k: v for k, v in config.items() if v is not None}})
    return _arch(fields, name, outer, generation)


def _arch(f: _Fields, name: str, outer: Mapping[str, Any], generation: Mapping[str, Any]) -> ArchConfig:
    hidden, num_heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    num_layers, context = f.integer("num_hidden_layers"), f.integer("max_position_embeddings", 2048)
    windows = _windows(f, name, num_layers)
    rope = _rope(f)
    scalar = f.get("query_pre_attn_scalar") if name == "gemma3" else None
    bos = generation.get("bos_token_id", f.get("bos_token_id", outer.get("bos_token_id")))
    eos = generation.get("eos_token_id")
    eos = eos if eos is not None else f.get("eos_token_id", outer.get("eos_token_id"))
    bias = bool(f.get("attention_bias", False))
    return ArchConfig(
        name=name,
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=f.integer("num_key_value_heads", num_heads),
        head_dim=f.integer("head_dim", hidden // num_heads),
        vocab_size=f.integer("vocab_size"),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=_theta(rope, f.number("rope_theta", 10_000.0)),
        max_position=context,
        tie_word_embeddings=bool(f.get("tie_word_embeddings", outer.get("tie_word_embeddings", False))),
        layer_windows=windows,
        rope_scaling=_scaling(rope, context),
        local_rope_theta=_local_theta(f) if name == "gemma3" else None,
        attention_bias=bias,
        # Qwen2 has biases on q, k and v only, whatever the others do.
        attention_out_bias=bias and name in ("llama", "qwen3"),
        mlp_bias=bool(f.get("mlp_bias", False)),
        activation=_activation(f, name),
        query_scale=None if scalar is None else float(scalar) ** -0.5,
        attn_logit_softcap=f.optional("attn_logit_softcapping"),
        final_logit_softcap=f.optional("final_logit_softcapping"),
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=_ids(eos),
        torch_dtype=str(f.get("torch_dtype", f.get("dtype", outer.get("torch_dtype", "float32")))),
    )


class _Fields:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ConfigError(f"config.json: {key} is missing or not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ConfigError(f"config.json: {key} is missing or not a positive number")
        return float(value)

    def optional(self, key: str) -> float | None:
        return None if self._values.get(key) is None else self.number(key)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _activation(f: _Fields, name: str) -> str:
    value = f.get("hidden_activation") if name == "gemma3" else f.get("hidden_act", "silu")
    allowed = ("gelu_pytorch_tanh",) if name == "gemma3" else ("silu",)
    if value not in allowed:
        raise ConfigError(f"config.json: activation {str(value)[:40]} is not supported; {allowed[0]} is")
    return str(value)


def _windows(f: _Fields, name: str, num_layers: int) -> tuple[int | None, ...]:
    if name in ("qwen2", "qwen3") and not f.get("use_sliding_window", False):
        return (None,) * num_layers
    if name == "llama" or f.get("sliding_window") is None:
        return (None,) * num_layers
    window = f.integer("sliding_window")
    types = f.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            raise ConfigError("config.json: layer_types does not have one entry per layer")
        return tuple(window if t == "sliding_attention" else None for t in types)
    if name == "gemma3":
        period = f.integer("sliding_window_pattern", 6)
        return tuple(None if (i + 1) % period == 0 else window for i in range(num_layers))
    first = f.get("max_window_layers", 28) if name != "mistral" else 0
    return tuple(window if i >= first else None for i in range(num_layers))


def _rope(f: _Fields) -> Mapping[str, Any]:
    """The rope settings of full-attention layers, from either spelling of config.json."""
    rope = f.get("rope_parameters") or f.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError("config.json: rope_scaling is not an object")
    full = rope.get("full_attention", rope)
    return full if isinstance(full, dict) else {}


def _theta(rope: Any, default: float) -> float:
    return _Fields(rope if isinstance(rope, dict) else {}).number("rope_theta", default)


def _local_theta(f: _Fields) -> float:
    rope = f.get("rope_parameters")
    local = rope.get("sliding_attention") if isinstance(rope, dict) else None
    return _theta(local, f.number("rope_local_base_freq", 10_000.0))


def _scaling(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    f = _Fields({k: v for k, v in rope.items() if v is not None})
    original = f.integer("original_max_position_embeddings", context)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=f.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=f.number("factor"),
            low_freq_factor=f.number("low_freq_factor"),
            high_freq_factor=f.number("high_freq_factor"),
            original_max_position=original,
        )
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=f.number("factor"),
            original_max_position=original,
            beta_fast=f.number("beta_fast", 32.0),
            beta_slow=f.number("beta_slow", 1.0),
            attention_factor=f.optional("attention_factor"),
            mscale=f.optional("mscale"),
            mscale_all_dim=f.optional("mscale_all_dim"),
            truncate=bool(f.get("truncate", True)),
        )
    raise ConfigError(
        f"config.json: rope scaling {str(kind)[:40]} is not supported; linear, llama3 and yarn are"
    )
