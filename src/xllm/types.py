"""The nouns both layers share: request, sampling parameters, model card, KV layout, snapshot.

Plain values (stdlib + msgspec). No behaviour beyond what follows from the fields; no policy,
no validation (that is `limits.py`), no I/O.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

PAGE_SIZE = 64
"""Tokens per KV page. Part of the numerics class: KV is reduced in blocks of this size."""

RequestClass = Literal["online", "offline"]


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn; vLLM's spelling and defaults.

    `max_tokens=None` means "as far as the context allows" and is resolved by the front.
    `bad_words_token_ids` is filled by the front from `bad_words`, `seed` when it is None.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    skip_reading_prefix_cache: bool = False
    extra_args: dict[str, Any] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple whichever way it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


Phase = Literal["encode", "prefill", "decode"]
"""What an instance does for a request. A role is a set of them."""

PREFILL: frozenset[Phase] = frozenset({"prefill"})
DECODE: frozenset[Phase] = frozenset({"decode"})
MIXED: frozenset[Phase] = PREFILL | DECODE


class TokenSegment(msgspec.Struct, frozen=True, tag="tokens"):
    """A run of prompt tokens."""

    token_ids: tuple[int, ...]


class MediaSegment(msgspec.Struct, frozen=True, tag="media"):
    """A reference to an image, sound or video. Its place is kept; no engine accepts one yet."""

    kind: str
    digest: bytes
    num_tokens: int


Segment = TokenSegment | MediaSegment


class SLO(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Service-level objectives in milliseconds; None = not asked for."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    ttlt_ms: float | None = None


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted request as the front hands it to an engine.

    `emitted` holds, per choice, the tokens already delivered by an earlier attempt; they are
    *output*, so penalties, min_tokens, max_tokens and the random counter go on where they were.
    `ended` lists the choices that are complete; no engine computes anything for them again.
    `deadline_ms` is the time left, not a wall time.
    """

    request_id: str
    model: str
    segments: tuple[Segment, ...]
    params: SamplingParams
    adapter: str | None = None
    cls: RequestClass = "online"
    priority: int = 0
    slo: SLO = SLO()
    deadline_ms: float | None = None
    tenant: str = ""
    cache_salt: str = ""
    trace: str | None = None
    attempt: int = 0
    emitted: tuple[tuple[int, ...], ...] = ()
    ended: tuple[int, ...] = ()

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return tuple(t for s in self.segments if isinstance(s, TokenSegment) for t in s.token_ids)


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """log p of one token under the raw distribution (before bias, masks, penalties, temperature)."""

    token_id: int
    logprob: float
    rank: int
    """1 = most likely."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The token's own logprob, then the `logprobs` most likely tokens in order of rank."""

    token: Logprob
    top: tuple[Logprob, ...] = ()


class KVGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers of equal KV lifetime and layout. `window` is in tokens, None = full attention."""

    kind: Literal["full", "window"]
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def page_bytes(self, dtype_bytes: int, scale_bytes: int = 0) -> int:
        """Bytes of one page: K and V of every layer of the group; a scale stands for a position and head."""
        per_head = self.head_dim * dtype_bytes + scale_bytes
        return 2 * len(self.layers) * PAGE_SIZE * self.num_kv_heads * per_head


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What a page holds. Instances exchange pages only when the digests are equal."""

    groups: tuple[KVGroup, ...]
    dtype: str
    page_size: int = PAGE_SIZE
    order: str = "page,kv,layer,head,token,dim"
    version: int = 1

    def digest(self) -> str:
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:32]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance tells about its model; the front needs nothing else to serve it.

    `assets` maps a name ("tokenizer", "chat_template", "text_config") to the digest under which
    the front may fetch its bytes. `head_width` is the width of the logits: the bound for every
    token id that a client names.
    """

    model_id: str
    aliases: tuple[str, ...]
    architecture: str
    weights_digest: str
    dtype: str
    vocab_size: int
    head_width: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    assets: dict[str, str]
    kv_layout_digest: str
    numerics_class: str
    deterministic: bool
    page_size: int
    num_pages: int
    page_bytes: int = 0
    """Of one page in every KV group; 0 = not told."""
    generation_config: dict[str, float | int] = {}
    modalities: tuple[str, ...] = ("text",)
    created_s: int = 0


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Immutable view of an engine: metrics, router and tests read the same thing.

    Page counts are summed over KV groups; `prefix_queries`/`prefix_hits` count tokens.
    `backlog_tokens` are prompt rows of accepted requests not yet computed; `num_decoding` sequences
    draw a token in every step and stand on `decode_context` tokens together. `cost` holds the fitted
    coefficients of `cost.StepCost` (empty = not known yet), `cost_error` their relative error; `half_cost` is
    what is known of them while all steps were of one kind, 0 = nothing.
    """

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0
    total_pages: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    owned_pages: int = 0
    transfer_pages: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_step_ms: float = 0.0
    num_accepted: int = 0
    num_ended: int = 0
    program_captures: int = 0
    program_replays: int = 0
    num_eager_steps: int = 0
    program_arena_bytes: int = 0
    backlog_tokens: int = 0
    num_decoding: int = 0
    decode_context: int = 0
    cost: tuple[float, ...] = ()
    cost_error: float = 0.0
    half_cost: tuple[float, ...] = ()
    draining: bool = False
    num_moved_out: int = 0
    """Requests handed over to peers, …"""
    num_moved_in: int = 0
    """… and taken over with pages that were used."""
    num_failed_moves: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    num_dropped_peers: int = 0
    """Connections that were refused or cut off: no hand-shake, garbage, too slow."""
    num_skipped_messages: int = 0
    """Messages of a newer version that were not understood."""
    num_step_gaps: int = 0
    """Steps that followed another one while there was work; in between the device idled for …"""
    step_gaps_ms: float = 0.0
    """… so long, all gaps together."""
