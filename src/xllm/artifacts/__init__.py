"""Models on this machine: finding and pulling them, reading GGUF and safetensors, text assets.

No torch, no engine. `resolve` is the door; what it returns is described in `source`.
"""

from xllm.artifacts.pull import Progress, pull
from xllm.artifacts.resolve import ListedModel, list_models, resolve, resolve_assets
from xllm.artifacts.source import DummySource, ModelSource, TensorSource

__all__ = [
    "DummySource",
    "ListedModel",
    "ModelSource",
    "Progress",
    "TensorSource",
    "list_models",
    "pull",
    "resolve",
    "resolve_assets",
]
