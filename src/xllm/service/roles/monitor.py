"""What a front has seen lately of demand and speed: sums of a period, smoothed. Numbers for `control` only.

Reads no clock: it is told when a period ends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_SMOOTH = 0.5
"""Weight of the newest period: two of them follow a step, one outlier moves it half the way."""
_MIN_GAPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Of one model. `prompt_tokens_per_s` arrive (uncached ones), in prompts of `prompt_len` on average."""

    prompt_tokens_per_s: float = 0.0
    prompt_len: float = 0.0


class LoadMonitor:
    """Owned by one front."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        self._prompts: Counter[str] = Counter()
        self._rate: dict[str, float] = {}
        self._len: dict[str, float] = {}
        self._gaps: dict[str, tuple[int, float]] = {}
        self._tpot_ms: dict[str, float] = {}
        self._began_s: float | None = None

    def arrived(self, model_id: str, num_tokens: int) -> None:
        """A prompt was admitted, with so many tokens to be computed."""
        self._tokens[model_id] += num_tokens
        self._prompts[model_id] += 1

    def spoke(self, instance: str, gap_ms: float) -> None:
        """A further token, so long after the one before."""
        num, total = self._gaps.get(instance, (0, 0.0))
        self._gaps[instance] = (num + 1, total + gap_ms)

    def period(self, now_s: float) -> None:
        """The period ends and another begins."""
        if self._began_s is not None and now_s > self._began_s:
            elapsed_s = now_s - self._began_s
            for model_id in {*self._rate, *self._tokens}:
                rate, old = self._tokens[model_id] / elapsed_s, self._rate.get(model_id, 0.0)
                self._rate[model_id] = old + _SMOOTH * (rate - old)
            for model_id, num in self._prompts.items():
                length = self._tokens[model_id] / num
                old = self._len.get(model_id, length)
                self._len[model_id] = old + _SMOOTH * (length - old)
        self._tpot_ms = {name: total / num for name, (num, total) in self._gaps.items() if num >= _MIN_GAPS}
        self._began_s = now_s
        self._tokens.clear()
        self._prompts.clear()
        self._gaps.clear()

    def demand(self, model_id: str) -> Demand:
        return Demand(
            prompt_tokens_per_s=self._rate.get(model_id, 0.0),
            prompt_len=self._len.get(model_id, 0.0),
        )

    def tpot_ms(self, instance: str) -> float | None:
        """Mean time between its tokens in the last period; None = it said too little."""
        return self._tpot_ms.get(instance)
