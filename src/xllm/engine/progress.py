"""What an engine says about itself between two messages: how far its step is, and how long steps take.

Written by the step thread, read by the I/O thread without a lock: single attributes, and a pulse that
mixes two of them is off by one step at most. No threads and no clock here.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm.cost import CostFitter, StepCost, attention_work
from xllm.engine.plan import StepPlan

Shape = tuple[int, int, int, int]
"""(prefill rows, tokens these attend to in all, decoding sequences, tokens these stand on) of a step: the
arguments of `cost.StepCost.step_ms`."""

COST_EVERY = 16
"""Steps between two readings of the fitted cost; solving for it takes longer than observing."""


_FIRST = (4, 8)


def no_layer() -> int:
    """For runners that do not tell."""
    return 0


class StepProgress:
    """`turn` counts turns of the step loop; while `busy` it must advance, or at least `layer` must."""

    __slots__ = ("busy", "layer", "predicted_ms", "since_s", "turn")

    def __init__(self, layer: Callable[[], int] = no_layer) -> None:
        self.layer = layer
        self.turn = 0
        self.busy = False
        self.since_s = 0.0
        self.predicted_ms = 0.0

    def begin(self, now_s: float) -> None:
        self.turn += 1
        self.since_s = now_s
        self.predicted_ms = 0.0
        self.busy = True


class Pace:
    """How long this engine's steps take, learnt from its own."""

    __slots__ = ("_fitter", "_num_steps", "coefficients", "cost", "error", "half")

    def __init__(self) -> None:
        self._fitter = CostFitter()
        self.cost: StepCost | None = None
        self._num_steps = 0
        self.coefficients: tuple[float, ...] = ()
        self.half: tuple[float, ...] = ()
        self.error = 0.0

    def predict_ms(self, shape: Shape) -> float:
        """0 = not known yet."""
        return 0.0 if self.cost is None else self.cost.step_ms(*shape)

    def observe(self, shape: Shape, elapsed_ms: float) -> None:
        self._fitter.observe(*shape, elapsed_ms)
        self._num_steps += 1
        if self._num_steps % COST_EVERY == 0 or self._num_steps in _FIRST:
            self.cost, half = self._fitter.cost(), self._fitter.half()
            self.half = () if half is None else half.coefficients
            if self.cost is not None:
                self.coefficients, self.error = self.cost.coefficients, self._fitter.error


def shape_of(plan: StepPlan) -> Shape:
    """What decides how long the step takes. A sequence of one row that draws is decoding."""
    rows = context = num_decoding = decode_context = 0
    for entry in plan.sequences:
        count = len(entry.tokens)
        if count == 1 and entry.sample is not None:
            num_decoding += 1
            decode_context += entry.start + 1
        else:
            rows += count
            context += attention_work(entry.start, count)
    return rows, context, num_decoding, decode_context
