"""The plan and the result of one step: plain values between scheduler, executor and simulator.

A plan can be printed, compared and replayed; nothing in it refers back to the scheduler. The
scheduler writes every field of a plan, the runner every field of a result. No torch here.
Structs, since five are made a sequence and step: a frozen dataclass takes thirty times as long to make.
"""

from __future__ import annotations

import msgspec

from xllm.errors import ErrorInfo
from xllm.types import SamplingParams, TokenLogprobs

PENDING = -1
"""In place of a token that is not known yet, since the plan before this one draws it."""


NO_SPACE = -1
"""In place of a space: the sequence is read through its page table."""


class SampleOp(msgspec.Struct, frozen=True, kw_only=True):
    """Draw the token at output `offset` from the last row's logits, once per entry of `choices`.

    `banned` are ids masked at this offset (EOS and stop ids while offset < min_tokens).
    `prompt`/`output` are filled only when penalties or bad_words need them (`needs_history`); a pending token
    is not in `output`: whoever resolves it appends it.
    """

    params: SamplingParams
    seed: int
    choices: tuple[int, ...]
    offset: int
    banned: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


class SequencePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one sequence in this step: positions start … start + len(tokens) − 1.

    `pages[g][i]` is the page of KV group g for positions [64·i, 64·i + 64); −1 = freed because it
    lies outside the group's window. The pages cover every row of this plan. The KV of all
    positions < start is complete.
    Rows with index ≥ `first_logit_row` yield logits (== len(tokens): none).
    `prompt_logprobs` = k asks, for each row that yields logits and has a successor in
    `prompt_targets`, for that successor's logprob and the k most likely tokens.
    """

    seq_id: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    first_logit_row: int
    sample: SampleOp | None = None
    prompt_logprobs: int | None = None
    prompt_targets: tuple[int, ...] = ()
    """The tokens at positions start + first_logit_row + 1 …, as many as lie in the prompt."""
    space: int = NO_SPACE
    """Where the pages stand in order, as far as that is mapped; the page table holds all the same."""
    pending: bool = False
    """The last of `tokens` is PENDING: the token that the plan before this one draws for this sequence."""


class PageCopy(msgspec.Struct, frozen=True):
    """Copy a whole page before the step's rows are computed (fork of a partial page)."""

    group: int
    src: int
    dst: int


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    sequences: tuple[SequencePlan, ...]
    copies: tuple[PageCopy, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)


class SampledToken(msgspec.Struct, frozen=True):
    token_id: int
    logprobs: TokenLogprobs | None = None


class ChoiceTokens(msgspec.Struct, frozen=True):
    """Tokens of one choice in order: 0 … 1 + drafts of them."""

    choice: int
    tokens: tuple[SampledToken, ...]


class SequenceResult(msgspec.Struct, frozen=True, kw_only=True):
    """`error` ends this sequence's request and nobody else's."""

    seq_id: int
    choices: tuple[ChoiceTokens, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: ErrorInfo | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    sequences: tuple[SequenceResult, ...]
    elapsed_ms: float = 0.0
    rerun: bool = False
    """Parts were computed a second time: who read pages while the step ran may have read half of it."""
    began_s: float = 0.0
    ended_s: float = 0.0
    """When the device began and ended it, on the monotonic clock; 0 = nobody looked."""
    dropped: bool = False
    """Nothing of it was run, not even its page copies: the step before it failed. `sequences` is empty."""
