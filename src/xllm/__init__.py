"""xLLM: LLM inference in two layers. `from xllm import LLM, SamplingParams`.

Names load on first use, so that `import xllm` stays light and never needs an accelerator library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from xllm.version import __version__

_HOMES = {
    "LLM": "xllm.llm",
    "AsyncLLM": "xllm.llm",
    "SamplingParams": "xllm.types",
    "EngineConfig": "xllm.config",
    "RequestOutput": "xllm.outputs",
    "CompletionOutput": "xllm.outputs",
    "XllmError": "xllm.errors",
    "RequestError": "xllm.errors",
    "AccessError": "xllm.errors",
    "NotFoundError": "xllm.errors",
    "CapacityError": "xllm.errors",
    "UnavailableError": "xllm.errors",
    "DeadlineError": "xllm.errors",
    "AbortedError": "xllm.errors",
    "ConfigError": "xllm.errors",
    "InternalError": "xllm.errors",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'xllm' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
