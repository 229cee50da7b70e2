"""From an entry of `settings` to the command that starts it: one module per engine, one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.compare.adapters import llama_cpp, openvino, vllm, xllm
from benchmarks.compare.adapters.context import Context, Missing
from benchmarks.compare.engine import Launch
from benchmarks.compare.settings import Entry

Adapter = Callable[[Entry, Context], Launch]

ADAPTERS: Mapping[str, Adapter] = {
    "xllm": xllm.launch,
    "vllm": vllm.launch,
    "llama.cpp": llama_cpp.launch,
    "openvino": openvino.launch,
}

__all__ = ["ADAPTERS", "Adapter", "Context", "Missing"]
