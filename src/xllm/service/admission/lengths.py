"""How long an answer will be: a high quantile of the recent answers of the same model and tenant.

Used for predicted memory only, never to cut an answer. Pure and bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque

WINDOW = 128
QUANTILE = 0.8
FIRST_GUESS = 256
"""Tokens assumed while nothing has been seen; max_tokens alone would be the context in most requests."""
MIN_SEEN = 8
MAX_GROUPS = 512


class _Recent:
    __slots__ = ("_lens", "_num_new", "_quantile")

    def __init__(self) -> None:
        self._lens: deque[int] = deque(maxlen=WINDOW)
        self._num_new = 0
        self._quantile = FIRST_GUESS

    def add(self, num_tokens: int) -> None:
        self._lens.append(num_tokens)
        self._num_new += 1

    def quantile(self) -> int | None:
        if len(self._lens) < MIN_SEEN:
            return None
        # Sorting for every request would cost more than it tells: a sixteenth of the window is little news.
        if self._num_new >= WINDOW // 16 or len(self._lens) == MIN_SEEN:
            self._num_new = 0
            ordered = sorted(self._lens)
            self._quantile = ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))]
        return self._quantile


class OutputLengths:
    """Keyed by model, and by model and tenant; the group used least recently gives way."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str], _Recent] = OrderedDict()

    def observe(self, model: str, tenant: str, num_tokens: int) -> None:
        """An answer ended by itself. Aborted ones tell nothing and are not entered."""
        for key in {(model, ""), (model, tenant)}:
            self._group(key).add(num_tokens)

    def predict(self, model: str, tenant: str, max_tokens: int) -> int:
        """Tokens of one answer, at most `max_tokens`; the tenant's own history counts first."""
        for key in ((model, tenant), (model, "")):
            group = self._groups.get(key)
            if group is not None and (seen := group.quantile()) is not None:
                return max(1, min(max_tokens, seen))
        return max(1, min(max_tokens, FIRST_GUESS))

    def _group(self, key: tuple[str, str]) -> _Recent:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Recent()
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return group
