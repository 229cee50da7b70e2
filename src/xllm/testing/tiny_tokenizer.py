"""A byte-level BPE tokenizer with a ChatML template, made in memory: text assets for tests.

No network, no model, no torch. Deterministic: the same vocabulary size always gives the same bytes.
It encodes any text (all 256 bytes are tokens) and merges common English pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product
from string import ascii_lowercase
from typing import Any

from xllm.text.byte_alphabet import BYTE_TO_CHAR

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def tiny_assets(vocab_size: int = 512) -> dict[str, bytes]:
    """Assets "tokenizer", "chat_template" and "text_config" of exactly `vocab_size` tokens.

    Ids 0–2 are `SPECIAL_TOKENS` (eos is 2, <|im_end|>), 3–258 the bytes in order, then merges.
    Raises ValueError below MIN_VOCAB_SIZE.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}")
    tokens = [*SPECIAL_TOKENS, *(BYTE_TO_CHAR[b] for b in range(256))]
    merges = list(islice(_merges(), vocab_size - len(tokens)))
    tokens += [left + right for left, right in merges]
    reserved = [f"<|reserved_{i}|>" for i in range(vocab_size - len(tokens))]
    tokens += reserved
    specials = {*SPECIAL_TOKENS, *reserved}
    return {
        "tokenizer": json.dumps(_tokenizer_json(tokens, merges, specials)).encode(),
        "chat_template": CHAT_TEMPLATE.encode(),
        "text_config": json.dumps(_TEXT_CONFIG).encode(),
    }


_COMMON = "etaoinshrdlu"

_TEXT_CONFIG: dict[str, Any] = {
    "bos_token": None,
    "bos_token_id": None,
    "eos_token": "<|im_end|>",
    "eos_token_id": 2,
    "eos_token_ids": [2],
    "add_bos_token": False,
    "add_eos_token": False,
}


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs whose parts exist before them: space+letter, two letters, then space+two letters."""
    space = BYTE_TO_CHAR[0x20]
    yield from ((space, letter) for letter in ascii_lowercase)
    yield from product(_COMMON, _COMMON)
    yield from (p for p in product(ascii_lowercase, ascii_lowercase) if not set(p) <= set(_COMMON))
    yield from ((space + a, b) for a, b in product(ascii_lowercase, ascii_lowercase))


def _tokenizer_json(tokens: list[str], merges: list[tuple[str, str]], specials: set[str]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(tokens)
            if token in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
