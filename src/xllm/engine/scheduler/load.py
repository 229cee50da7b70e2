"""How much work is left, counted as it comes and goes: a router's view of a scheduler.

Nothing here decides. A sequence is either behind by more than its next row (backlog) or draws in every
step (decoding); each carries what was counted for it, so that a change costs no walk over the others.
"""

from __future__ import annotations

from xllm.engine.request import Sequence


class Load:
    """Written by the scheduler."""

    __slots__ = ("backlog_tokens", "decode_context", "num_decoding")

    def __init__(self) -> None:
        self.backlog_tokens = 0
        self.num_decoding = 0
        self.decode_context = 0

    def count(self, seq: Sequence) -> None:
        """After any change of a live sequence's tokens or computed rows."""
        length = len(seq.tokens)
        behind = length - seq.num_computed
        if behind > 1:
            rows, context = behind, 0
        else:
            rows, context = 0, length
        if rows != seq.load_rows:
            self.backlog_tokens += rows - seq.load_rows
            seq.load_rows = rows
        before = seq.load_context
        if context != before:
            self.decode_context += context - before
            self.num_decoding += (context > 0) - (before > 0)
            seq.load_context = context

    def drew(self, seq: Sequence, num_tokens: int) -> None:
        """`count` after a draw, which every running sequence goes through in every step."""
        if seq.load_context:
            seq.load_context += num_tokens
            self.decode_context += num_tokens
        else:
            self.count(seq)

    def drop(self, seq: Sequence) -> None:
        """It has ended."""
        self.backlog_tokens -= seq.load_rows
        self.decode_context -= seq.load_context
        self.num_decoding -= seq.load_context > 0
        seq.load_rows = seq.load_context = 0
