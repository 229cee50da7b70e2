"""A platform whose steps take the time that a cost formula says, and almost no CPU: for policies under load.

Many instances on a small machine, each as fast as if it had its own. Tokens depend on the KV that is read, as
on platform null; which ones they are does not matter. PACED_MS = "base,row,attention,sequence,context".
"""

from __future__ import annotations

import os
import time

import xxhash

from xllm.engine.plan import ChoiceTokens, SampledToken, SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.platform.null import NullPlatform
from xllm.engine.platform.null_runner import NullRunner
from xllm.engine.progress import shape_of

BASE_MS, ROW_MS, ATTENTION_MS, SEQUENCE_MS, CONTEXT_MS = (
    float(number) for number in os.environ.get("PACED_MS", "8,0.25,0,0.5,0.0005").split(",")
)
FIRST_TOKEN, NUM_TOKENS = 1000, 20_000


def step_ms(plan: StepPlan) -> float:
    rows, attention, num_decoding, context = shape_of(plan)
    return (
        BASE_MS + ROW_MS * rows + ATTENTION_MS * attention + SEQUENCE_MS * num_decoding + CONTEXT_MS * context
    )


class PacedRunner(NullRunner):
    """The time of a step is waited for as a whole, with whatever computing its tokens took in it."""

    def execute(self, plan: StepPlan) -> StepResult:
        end_s = time.monotonic() + step_ms(plan) / 1000
        result = super().execute(plan)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return result

    def _sequence(self, entry: SequencePlan) -> SequenceResult:
        self._write(entry)
        if entry.sample is None:
            return SequenceResult(seq_id=entry.seq_id)
        seen = self._visible(0, entry, entry.start + len(entry.tokens) - 1)
        token = SampledToken(FIRST_TOKEN + xxhash.xxh3_64_intdigest(seen.tobytes()) % NUM_TOKENS)
        choices = tuple(ChoiceTokens(choice=c, tokens=(token,)) for c in entry.sample.choices)
        return SequenceResult(seq_id=entry.seq_id, choices=choices)


class PacedPlatform(NullPlatform):
    name = "paced"
    runner_type = PacedRunner


PLATFORM = PacedPlatform()
