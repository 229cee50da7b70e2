"""The time of one engine step as a linear form over its work, and what follows from it.

t = c0 + c1·prefill_rows + c2·prefill_context + c3·num_decoding + c4·decode_context, in ms, all c ≥ 0.
Summed over the rows of a prompt this is quadratic in its length and knows cached prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xllm.errors import InternalError

NUM_COEFFICIENTS = 5


def attention_work(start: int, num_rows: int) -> int:
    """Tokens that the prompt rows start … start+num_rows−1 attend to, summed over these rows.

    This is the unit of `prefill_context`: it adds up over chunks and over the prompts of a step, so
    a prompt costs the same attention however it is cut.
    """
    return num_rows * start + num_rows * (num_rows + 1) // 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """An instance's fitted steps. `coefficients` is what crosses the wire (EngineSnapshot.cost)."""

    coefficients: tuple[float, ...]

    @classmethod
    def from_coefficients(cls, coefficients: Sequence[float]) -> StepCost:
        """Raises InternalError for what no fitter makes; for a peer's word see `known`."""
        cost = cls.known(coefficients)
        if cost is None:
            message = (
                f"a step cost has {NUM_COEFFICIENTS} finite coefficients >= 0, not {tuple(coefficients)}"
            )
            raise InternalError(message)
        return cost

    @classmethod
    def known(cls, coefficients: Sequence[float]) -> StepCost | None:
        """What a snapshot says: None when it says nothing yet, or nothing usable."""
        if len(coefficients) != NUM_COEFFICIENTS:
            return None
        # A chain that NaN and infinity fail, too. Routers ask this for every instance they look at.
        for c in coefficients:
            if not 0.0 <= c < math.inf:
                return None
        return cls(tuple(coefficients))

    def step_ms(
        self, prefill_rows: float, prefill_context: float, num_decoding: float, decode_context: float
    ) -> float:
        """One step. `prefill_context` as `attention_work` counts it; `decode_context` likewise: the
        tokens that all decoding sequences stand on together."""
        c0, c1, c2, c3, c4 = self.coefficients
        return c0 + c1 * prefill_rows + c2 * prefill_context + c3 * num_decoding + c4 * decode_context

    def prefill_ms(self, num_tokens: int, num_cached: int = 0, max_rows: int = 0) -> float:
        """A prompt of `num_tokens` alone, the first `num_cached` of which are in pages already.

        Cached tokens cost no rows, but the others attend to them. At least one row is computed: the
        one that the first token is drawn from. `max_rows` > 0 = rows of a step; the constant part of
        a step is then paid per chunk.
        """
        cached = max(0, min(num_cached, num_tokens - 1))
        rows = num_tokens - cached
        num_steps = -(-rows // max_rows) if max_rows > 0 else 1
        c0, c1, c2, _, _ = self.coefficients
        return c0 * num_steps + c1 * rows + c2 * attention_work(cached, rows)

    def decode_ms(self, num_decoding: float, decode_context: float) -> float:
        """One step in which `num_decoding` sequences draw a token each: their TPOT."""
        c0, _, _, c3, c4 = self.coefficients
        return c0 + c3 * num_decoding + c4 * decode_context
