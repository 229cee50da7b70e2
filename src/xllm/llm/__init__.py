"""The Python API in vLLM's spelling: `LLM` (blocking, batches) and `AsyncLLM` (streams, cancellation).

Both are a thin layer over a `LocalService`: inputs become drafts, deltas become `RequestOutput`s.
No policy, no maths; the engine is a process of its own here too.
"""

from xllm.llm.blocking import LLM
from xllm.llm.streaming import AsyncLLM

__all__ = ["LLM", "AsyncLLM"]
