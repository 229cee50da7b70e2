"""Text and tokens: tokenizer, sandboxed chat template, incremental detokenizer, stop strings.

Used by fronts; needs no engine, no torch, no network.
"""

from xllm.text.assets import TextAssets
from xllm.text.chat import encode_chat
from xllm.text.detokenizer import IncrementalDetokenizer
from xllm.text.stop import StopChecker, StopMatch
from xllm.text.template import ChatTemplate
from xllm.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "StopChecker",
    "StopMatch",
    "TextAssets",
    "Tokenizer",
    "encode_chat",
]
