"""Requests and sequences inside an engine: one state machine, one terminal event.

Nouns with the bookkeeping that follows from them; decisions live in `scheduler`, pages in `memory`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from xllm.engine.memory.manager import PageTable
from xllm.types import FinishReason, RequestSpec, SamplingParams, TokenLogprobs
from xllm.wire.messages import CREDIT_WINDOW


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream; equal to itself only. The only rule: `num_computed` chases `num_tokens`.

    Invariants: KV of positions < num_computed is complete in `table`; tokens[prompt_len:] is output
    and stays output after preemption or resume; `draws` lists the choices that the next draw serves
    (more than one only before the fork of n choices).
    """

    seq_id: int
    choice: int
    tokens: list[int]
    prompt_len: int
    draws: tuple[int, ...]
    rank: tuple[float, ...] = ()
    """The order's key with the choice; smaller is served first. Orders are pure, so it is made once."""
    num_computed: int = 0
    in_flight: int = 0
    """Rows behind the computed ones that are planned and not absorbed yet …"""
    drawing: int = 0
    """… and the tokens that these draw, which are not known yet."""
    table: PageTable | None = None
    state: SequenceState = SequenceState.WAITING
    held: bool = False
    """Not planned, for the sake of a transfer: its pages are on their way here, or it is about to go on
    elsewhere. It keeps what pages it has."""
    num_committed: int = 0
    num_streamed: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    load_rows: int = 0
    """What `scheduler.load` has counted for this sequence: rows to catch up with, or else …"""
    load_context: int = 0
    """… the tokens it stands on when it draws in every step."""

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def behind(self) -> int:
        """Rows to compute before the next token can be drawn, those under way included."""
        return len(self.tokens) - self.num_computed

    @property
    def unplanned(self) -> int:
        """Rows behind those that are computed or under way; what these draw is a row then."""
        return len(self.tokens) + self.drawing - self.num_computed - self.in_flight

    @property
    def out_of_credit(self) -> bool:
        """Too far ahead of the front's commit log: its reader is slow, so it waits."""
        return len(self.tokens) + self.drawing - self.prompt_len - self.num_committed >= CREDIT_WINDOW

    @property
    def stalled(self) -> bool:
        """It cannot run now, whatever room there is."""
        return self.held or self.out_of_credit


@dataclass(slots=True)
class Request:
    """A submitted request and its sequences. `arrival` orders requests of equal rank.

    `owner` is the number of the session that submitted it; ids are unique within one only.
    """

    spec: RequestSpec
    arrival: int
    arrived_s: float
    root: bytes
    prompt: tuple[int, ...]
    owner: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs_sent: bool = False
    token_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    num_cached: int | None = None
    """Prompt tokens found in the prefix cache at first admission; None = not yet admitted."""
    admitted_s: float = 0.0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    """From admission to the first drawn token; 0 until then."""
    num_preemptions: int = 0
    moving: bool = False
    """A transfer has pinned its pages: preempting it frees none of them at once."""
    claimed: bool = False
    """Some of its KV was brought by a transfer."""
    ended: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """What it is known by inside the engine."""
        return self.owner, self.spec.request_id

    @property
    def params(self) -> SamplingParams:
        return self.spec.params

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and not self.prompt_logprobs_sent

    @property
    def reads_cache(self) -> bool:
        """prompt_logprobs needs every prompt row's logits, so it computes them all."""
        return not self.wants_prompt_logprobs and not self.params.skip_reading_prefix_cache

    @property
    def all_ended(self) -> bool:
        if len(self.sequences) + len(self.spec.ended) != self.spec.params.n:
            return False  # not forked yet; a choice has one sequence, or ended in an earlier attempt
        return all(s.state is SequenceState.ENDED for s in self.sequences)
