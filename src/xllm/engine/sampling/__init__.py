"""The sampler: from a row of float32 logits to tokens, defined exactly in docs/design/0002-sampler.md.

numpy only, no torch: reference and native platforms, speculation and resume call the same code.
What must not live here: scheduling, stop conditions, text.
"""

from xllm.engine.sampling.constraints import needs_history
from xllm.engine.sampling.processors import LogitsProcessor, load_processors
from xllm.engine.sampling.sampler import Sampler

__all__ = ["LogitsProcessor", "Sampler", "load_processors", "needs_history"]
