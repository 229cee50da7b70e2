"""How byte-level vocabularies cut text before merging, by the name GGUF files give it.

The patterns are part of the models: one character off and every token differs. Data only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Patterns are applied in order, each cutting the pieces of the one before; `digits` come first."""

    patterns: tuple[str, ...]
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def steps(self) -> list[dict[str, Any]]:
        """The steps in the `tokenizers` library's JSON."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        steps += [
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
            for p in self.patterns
        ]
        return steps


_GPT2_PRE = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((_GPT2,), digits=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_PRE,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "llama3": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "llama-v3": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
}
