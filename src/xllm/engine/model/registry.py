"""Which architectures exist: a literal table, then entry points of the group `xllm.models`."""

from __future__ import annotations

from importlib.metadata import entry_points

from xllm.engine.model import gemma3, llama, qwen2, qwen3
from xllm.engine.model.definition import ModelDefinition
from xllm.errors import ConfigError

MODELS = {
    "llama": llama.DEFINITION,
    "mistral": llama.DEFINITION,
    "qwen2": qwen2.DEFINITION,
    "qwen3": qwen3.DEFINITION,
    "gemma3": gemma3.DEFINITION,
}


def find_model(name: str) -> ModelDefinition:
    """The definition of architecture `name`. Raises ConfigError with the known names."""
    if name in MODELS:
        return MODELS[name]
    outside = {entry.name: entry for entry in entry_points(group="xllm.models")}
    if name not in outside:
        known = ", ".join(sorted({*MODELS, *outside}))
        raise ConfigError(f"model: architecture {name!r} is not known; known are {known}")
    found = outside[name].load()
    if not isinstance(found, ModelDefinition):
        raise ConfigError(f"model: entry point {name!r} of xllm.models is not a ModelDefinition")
    return found
