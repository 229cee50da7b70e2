"""Fits `StepCost` on line to the steps that an engine really ran.

Weighted least squares with forgetting, non-negative, on normal equations. The caller measures;
nothing here reads a clock. A few µs an observation: it runs between two steps.
"""

from __future__ import annotations

from xllm.cost.nonnegative import solve_nonnegative
from xllm.cost.step import NUM_COEFFICIENTS, StepCost

MIN_STEPS = 16
"""Observations before a first answer, and how many of either kind among them:"""
MIN_OF_A_KIND = 4

_REFIT_EVERY = 64
_HALF_EVERY = 32
_FIRST_HALVES = (4, 8, 16)
"""Steps of long prompts take long: what the first ones tell is better than what nobody has measured."""
_GROWTH = 1.0 / 0.996
"""Per observation newer ones weigh this much more: about 250 steps of a kind are remembered."""
_RIDGE = 1e-5
"""On slopes only, relative: work that was never varied is put down to the constant, since a slope that
was not seen must not be extrapolated."""
_EWMA = 0.02
_OUTLIER = 4.0
_SMALLEST_MS = 1e-3

_PAIRS = [(i, j) for i in range(NUM_COEFFICIENTS) for j in range(i, NUM_COEFFICIENTS)]
_WITH_PREFILL, _DECODE_ONLY = 0, 1


class CostFitter:
    """Owned by one step thread. `cost()` is None until enough varied steps were seen; until then `half()` is
    what steps of one kind alone tell, with 0 for the work that they did not have.

    Steps with and without prompt rows are summed apart and forgotten apart: hours of decoding alone
    must not fade what is known of prefill. Errors count relative to the predicted time, so that
    short steps are fitted as well as long ones; beyond `_OUTLIER` times the usual error an
    observation's pull is bounded (Huber), so that a step during which the machine stalled changes nothing,
    while a lasting change widens the usual error and is followed.
    """

    __slots__ = (
        "_cost",
        "_error",
        "_half",
        "_num_decode",
        "_num_prefill",
        "_num_steps",
        "_spread",
        "_sums",
        "_targets",
        "_weights",
    )

    def __init__(self) -> None:
        self._sums = [[0.0] * len(_PAIRS) for _ in range(2)]
        self._targets = [[0.0] * NUM_COEFFICIENTS for _ in range(2)]
        self._weights = [1.0, 1.0]
        self._num_steps = 0
        self._num_prefill = 0
        self._num_decode = 0
        self._cost: StepCost | None = None
        self._half: StepCost | None = None
        self._error = 0.0
        self._spread = 0.1

    @property
    def error(self) -> float:
        """Recent mean of |predicted − measured| ÷ measured."""
        return self._error

    def cost(self) -> StepCost | None:
        return self._cost

    def half(self) -> StepCost | None:
        """Of an engine that only decodes, or only computes prompts. Nothing to predict a whole step by."""
        return self._half

    def observe(
        self,
        prefill_rows: float,
        prefill_context: float,
        num_decoding: float,
        decode_context: float,
        elapsed_ms: float,
    ) -> None:
        """One step's work, in the units of `StepCost.step_ms`, and the time it took."""
        if not 0.0 < elapsed_ms < 1e9 or prefill_rows + num_decoding <= 0:
            return
        weight = self._weigh(prefill_rows, prefill_context, num_decoding, decode_context, elapsed_ms)
        kind = _WITH_PREFILL if prefill_rows > 0 else _DECODE_ONLY
        grown = self._weights[kind] = self._weights[kind] * _GROWTH
        weight *= grown
        self._add(kind, weight, prefill_rows, prefill_context, num_decoding, decode_context, elapsed_ms)
        self._num_steps += 1
        self._num_prefill += prefill_rows > 0
        self._num_decode += num_decoding > 0
        if self._is_due():
            self._cost, self._half = self._refit(), None
        elif self._cost is None and (self._num_steps % _HALF_EVERY == 0 or self._num_steps in _FIRST_HALVES):
            self._half = self._known_half(self._refit())

    def _known_half(self, cost: StepCost | None) -> StepCost | None:
        """Without what a handful of steps of the other kind would claim."""
        if cost is None:
            return None
        c0, c1, c2, c3, c4 = cost.coefficients
        if self._num_prefill < MIN_OF_A_KIND:
            c1 = c2 = 0.0
        if self._num_decode < MIN_OF_A_KIND:
            c3 = c4 = 0.0
        return StepCost((c0, c1, c2, c3, c4))

    def _weigh(
        self, rows: float, context: float, num: float, decode_context: float, elapsed_ms: float
    ) -> float:
        cost = self._cost
        if cost is None:
            # Nothing to compare with yet. Weighed by its own time a stalled step is weak by itself.
            return 1.0 / max(elapsed_ms, _SMALLEST_MS) ** 2
        predicted = max(cost.step_ms(rows, context, num, decode_context), _SMALLEST_MS)
        missed = abs(elapsed_ms - predicted)
        self._error += _EWMA * (missed / max(elapsed_ms, _SMALLEST_MS) - self._error)
        relative = missed / predicted
        bound = _OUTLIER * self._spread + 0.02
        weight = 1.0 / (predicted * predicted)
        if relative > bound:
            weight *= bound / relative
            relative = bound
        self._spread += _EWMA * (relative - self._spread)
        return weight

    def _add(
        self, kind: int, w: float, rows: float, context: float, num: float, decode_context: float, t: float
    ) -> None:
        """Add one observation to the sums: unrolled, as most products are zero and this runs every step."""
        s, b = self._sums[kind], self._targets[kind]
        s[0] += w
        b[0] += w * t
        if num > 0:
            wn, wc = w * num, w * decode_context
            s[3] += wn
            s[4] += wc
            s[12] += wn * num
            s[13] += wn * decode_context
            s[14] += wc * decode_context
            b[3] += wn * t
            b[4] += wc * t
        if rows > 0:
            wr, wa = w * rows, w * context
            s[1] += wr
            s[2] += wa
            s[5] += wr * rows
            s[6] += wr * context
            s[9] += wa * context
            b[1] += wr * t
            b[2] += wa * t
            if num > 0:
                s[7] += wr * num
                s[8] += wr * decode_context
                s[10] += wa * num
                s[11] += wa * decode_context

    def _is_due(self) -> bool:
        n = self._num_steps
        if n < MIN_STEPS or self._num_prefill < MIN_OF_A_KIND or self._num_decode < MIN_OF_A_KIND:
            return False
        return self._cost is None or n % _REFIT_EVERY == 0 or n in (32, 96)

    def _refit(self) -> StepCost | None:
        for kind, weight in enumerate(self._weights):
            # Back to weight 1, so that the growth never overflows.
            self._sums[kind] = [v / weight for v in self._sums[kind]]
            self._targets[kind] = [v / weight for v in self._targets[kind]]
            self._weights[kind] = 1.0
        matrix = [[0.0] * NUM_COEFFICIENTS for _ in range(NUM_COEFFICIENTS)]
        for (i, j), one, other in zip(_PAIRS, *self._sums, strict=True):
            matrix[i][j] = matrix[j][i] = one + other
        target = [one + other for one, other in zip(*self._targets, strict=True)]
        # Unit diagonal: rows, row-tokens and sequences differ by many orders of magnitude.
        scale = [matrix[i][i] ** -0.5 if matrix[i][i] > 0.0 else 0.0 for i in range(NUM_COEFFICIENTS)]
        for i, row in enumerate(matrix):
            for j in range(NUM_COEFFICIENTS):
                row[j] *= scale[i] * scale[j]
            row[i] = 1.0 + (_RIDGE if i else 0.0)
        scaled = [t * k for t, k in zip(target, scale, strict=True)]
        solution = solve_nonnegative(matrix, scaled)
        return StepCost.known([x * k for x, k in zip(solution, scale, strict=True)])
