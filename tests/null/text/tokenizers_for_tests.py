"""Two small tokenizers, one per family, for the tests beside this file."""

from __future__ import annotations

from functools import cache

from xllm.artifacts.gguf_tokenizer import assets_from_metadata
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.text import TextAssets

_PIECES = ["▁the", "▁cat", "▁s", "at", "he", "ca", "th", "▁t", "▁c", "▁sat"]


@cache
def byte_level() -> TextAssets:
    return TextAssets.from_card_assets(tiny_assets())


@cache
def sentencepiece() -> TextAssets:
    """SentencePiece style: leading space, byte tokens for what has no piece, <s> in front."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3] + [6] * 256
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += letters + _PIECES
    types += [1] * (len(letters) + len(_PIECES))
    return TextAssets.from_card_assets(
        assets_from_metadata(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": types,
                "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.unknown_token_id": 0,
            }
        )
    )
