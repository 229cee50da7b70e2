"""Finds the literals of special tokens in text, whole or cut off at an edge. Plain string work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


class SpecialLiterals:
    """The literals of one tokenizer's special tokens. Longest literal wins where several begin."""

    def __init__(self, literals: Iterable[str]) -> None:
        ordered = sorted({x for x in literals if x}, key=lambda x: (-len(x), x))
        self._pattern = re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None
        self._starts = frozenset(x[:n] for x in ordered for n in range(1, len(x)))
        self._ends = frozenset(x[n:] for x in ordered for n in range(1, len(x)))
        self._max_len = max(map(len, ordered), default=0)

    def sub(self, replace: Callable[[str], str], text: str) -> str:
        """`text` with every literal replaced by `replace(literal)`."""
        return text if self._pattern is None else self._pattern.sub(lambda m: replace(m[1]), text)

    def split(self, text: str) -> list[str]:
        """`text` cut so that every literal is a piece of its own; the pieces join to `text`."""
        return [text] if self._pattern is None else [p for p in self._pattern.split(text) if p]

    def could_start(self, text: str) -> bool:
        """Whether the end of `text` is the beginning of a literal."""
        return any(text[-n:] in self._starts for n in range(1, min(self._max_len, len(text) + 1)))

    def could_end(self, text: str) -> bool:
        """Whether the beginning of `text` is the end of a literal."""
        return any(text[:n] in self._ends for n in range(1, min(self._max_len, len(text) + 1)))
