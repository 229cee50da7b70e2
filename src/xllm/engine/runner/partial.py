"""What becomes of a sequence while its logits arrive in pieces. What must not live here: when they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm.engine.kernels.ops import F32
from xllm.engine.plan import ChoiceTokens, SampleOp, SequencePlan, SequenceResult
from xllm.engine.runner.batch import LogitPiece
from xllm.engine.sampling import Sampled, Sampler, SampleRow
from xllm.errors import ErrorInfo, XllmError
from xllm.types import TokenLogprobs

LogitsTap = Callable[[int, int, F32], None]
"""(seq_id, position, logits (V,)): sees every row of logits that is computed; for tests."""


class Partial:
    """A sequence's result while its logits arrive in pieces."""

    __slots__ = ("_scored", "choices", "error", "sequence")

    def __init__(self, sequence: SequencePlan) -> None:
        self.sequence = sequence
        self.error: ErrorInfo | None = None
        self.choices: tuple[ChoiceTokens, ...] = ()  # where drawn, one token each
        self._scored: list[TokenLogprobs] = []

    def score(self, sampler: Sampler, piece: LogitPiece, logits: F32) -> None:
        """Log-probabilities of the prompt's tokens, where the plan asks for them."""
        sequence = self.sequence
        if sequence.prompt_logprobs is not None:
            targets = sequence.prompt_targets[piece.offset : piece.offset + piece.count]
            self._scored.extend(sampler.prompt_logprobs(logits, targets, sequence.prompt_logprobs))

    def take(self, sampled: Sampled) -> None:
        if isinstance(sampled, XllmError):
            self.error = sampled.info()
        else:
            self.choices = sampled

    def result(self) -> SequenceResult:
        if self.error is not None:
            return SequenceResult(seq_id=self.sequence.seq_id, error=self.error)
        return SequenceResult(
            seq_id=self.sequence.seq_id, choices=self.choices, prompt_logprobs=tuple(self._scored)
        )


def draws_of(sequences: Sequence[SequencePlan], pieces: Sequence[LogitPiece]) -> list[tuple[int, SampleRow]]:
    """(index of the sequence, what to draw from which row of the slice) for each sequence that ends in it."""
    found: list[tuple[int, SampleRow]] = []
    end = 0
    for piece in pieces:
        end += piece.count
        op = op_after(sequences[piece.index], piece)
        if op is not None:
            found.append((piece.index, SampleRow(end - 1, op)))
    return found


def op_after(sequence: SequencePlan, piece: LogitPiece) -> SampleOp | None:
    """What is to be drawn from the last row of this piece."""
    is_last = sequence.first_logit_row + piece.offset + piece.count == len(sequence.tokens)
    return sequence.sample if is_last else None


def show(tap: LogitsTap, sequence: SequencePlan, piece: LogitPiece, logits: F32) -> None:
    first = sequence.start + sequence.first_logit_row + piece.offset
    for i, row in enumerate(logits):
        tap(sequence.seq_id, first + i, row.copy())
