"""The sampler: from a row of float32 logits to tokens, defined exactly in docs/design/0002-sampler.md.

numpy only, no torch; a platform may bring a faster drawer that gives the same tokens.
What must not live here: scheduling, stop conditions, text.
"""

from xllm.engine.sampling.constraints import needs_history
from xllm.engine.sampling.drawing import RowDrawer, SampleRow
from xllm.engine.sampling.processors import LogitsProcessor, load_processors
from xllm.engine.sampling.sampler import Sampled, Sampler, plainly

__all__ = [
    "LogitsProcessor",
    "RowDrawer",
    "SampleRow",
    "Sampled",
    "Sampler",
    "load_processors",
    "needs_history",
    "plainly",
]
