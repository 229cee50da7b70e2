"""Filling in tokens that were not known when a step was planned, from the results of the step before it.

For executors whose runner does not do so itself, and for steps that are run again in parts. Pure.
"""

from __future__ import annotations

import msgspec

from xllm.engine.plan import SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.sampling import needs_history

def fill_in(plan: StepPlan, before: StepResult | None) -> StepPlan:
    """The plan with every pending token known from the step `before`.

    Sequences that drew nothing there are left out: they have failed, and nobody waits for more of them.
    """
    if not any(entry.pending for entry in plan.sequences):
        return plan
    drawn: dict[int, int] = {}
    for result in () if before is None else before.sequences:
        # Who drew for several choices is not planned ahead.
        if len(result.choices) == 1:
            drawn[result.seq_id] = result.choices[0].tokens[-1].token_id
    filled = [
        _known(entry, drawn[entry.seq_id]) if entry.pending else entry
        for entry in plan.sequences
        if not entry.pending or entry.seq_id in drawn
    ]
    return msgspec.structs.replace(plan, sequences=tuple(filled))


def _known(entry: SequencePlan, token: int) -> SequencePlan:
    sample = entry.sample
    if sample is not None and needs_history(sample.params):
        sample = msgspec.structs.replace(sample, output=(*sample.output, token))
    return msgspec.structs.replace(entry, tokens=(*entry.tokens[:-1], token), sample=sample, pending=False)


def left_out(plan: StepPlan, filled: StepPlan) -> tuple[SequenceResult, ...]:
    """Empty results of the sequences that `fill_in` left out; nobody waits for them."""
    if len(plan.sequences) == len(filled.sequences):
        return ()
    there = {entry.seq_id for entry in filled.sequences}
    return tuple(SequenceResult(seq_id=e.seq_id) for e in plan.sequences if e.seq_id not in there)
