"""Every message between a front and an engine. Typed, tagged, versioned; unknown fields are ignored.

Nothing here acts. Only this module may define what crosses a process border; token ids and sizes
are checked again by the receiver (`limits.py`), since a peer is not trusted to have checked.
"""

from __future__ import annotations

import msgspec

from xllm.config import EngineConfig
from xllm.errors import ErrorInfo
from xllm.observability.profile import ProcessProfile
from xllm.types import EngineSnapshot, FinishReason, ModelCard, RequestSpec, TokenLogprobs

WIRE_VERSION = 2


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of each side. Versions N and N−1 talk; anything else is refused by name.

    `peer_id` is the sender's lasting name in the cluster, `incarnation` is drawn anew by each process.
    `nonce` is what the other side's Proof must cover; empty on an inherited socket, where nobody else
    can be at the other end and no proof is asked for.
    """

    version: int = WIRE_VERSION
    incarnation: str = ""
    role: str = ""
    peer_id: str = ""
    cluster: str = ""
    nonce: bytes = b""


class Proof(msgspec.Struct, frozen=True, kw_only=True, tag="proof"):
    """Second message of each side on a network connection: knowledge of the cluster's key (`wire.proof`)."""

    mac: bytes


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """Last message of a side that ends a hand-shake or a connection; the reason for the other side's log."""

    error: ErrorInfo


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag="attach"):
    """Front → engine that has loaded already: take requests from me, too. Answered by Ready."""


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Front → engine: become this engine. `peer_key` is what engines of this front prove to each other before
    they exchange pages; never logged."""

    config: EngineConfig
    peer_key: bytes = b""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Engine → front while loading: what is going on and how long the last stage took.

    `assets` (name → bytes) come once, as soon as they are known: a front may get its tokenizer ready while
    the weights load. They are a hint; the card's digests decide.
    """

    stage: str
    elapsed_s: float = 0.0
    assets: dict[str, bytes] = {}


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Engine → front: loaded. `report` lines say what was chosen and why."""

    card: ModelCard
    pid: int
    report: tuple[str, ...] = ()
    max_reqs: int | None = None
    phases: tuple[str, ...] = ("prefill", "decode")
    incarnation: str = ""
    endpoints: tuple[str, ...] = ()
    """Where peers bring or fetch KV pages, best first (`unix:…`, `tcp:host:port`); empty = nowhere."""


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag="start_failed"):
    error: ErrorInfo


class AssetRequest(msgspec.Struct, frozen=True, kw_only=True, tag="asset_request"):
    digest: str


class Asset(msgspec.Struct, frozen=True, kw_only=True, tag="asset"):
    """`data` is None when the engine has no asset of that digest."""

    digest: str
    data: bytes | None


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """`transfer_id`: the KV of this request's sequences arrives, or has arrived, under that name; where it
    does not, they are computed. `sources`: endpoints to pull it from, best first; empty = it is pushed.
    """

    spec: RequestSpec
    transfer_id: str = ""
    sources: tuple[str, ...] = ()


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """Front → engine, before the Submit that names the same `transfer_id`: pull the cached pages of a prefix
    from a peer. `digests` is the chain of page names, `root` its first parent."""

    transfer_id: str
    sources: tuple[str, ...]
    root: bytes
    digests: tuple[bytes, ...]


class Move(msgspec.Struct, frozen=True, kw_only=True, tag="move"):
    """Front → engine that has the request: hand its sequences over to the engine at the first of
    `endpoints` that can be reached.

    What is complete is copied while the sequences go on; once each of them has drawn a token and little is
    left they hold still, the rest follows, and Moved tells the outcome. After a success they hold until
    the front ends this attempt here; after a failure they go on. `mode` "pull": nothing is sent, the
    sequences hold as soon as they may and the receiver, told by its Submit, fetches.
    """

    request_id: str
    attempt: int
    transfer_id: str
    endpoints: tuple[str, ...] = ()
    mode: str = "push"


class CancelTransfer(msgspec.Struct, frozen=True, kw_only=True, tag="cancel_transfer"):
    """Front → either engine: give this transfer up; pages are free within a second on both sides."""

    transfer_id: str


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag="moved", omit_defaults=True):
    """Engine → front: how a Move ended, after the frames of all tokens drawn before. With mode "pull" and no
    error: the sequences hold still and can be fetched.

    `transfer_ms` is the time in which bytes moved, `exposed_ms` what of it lay behind the last computed row.
    """

    request_id: str
    attempt: int
    transfer_id: str
    error: ErrorInfo | None = None
    num_bytes: int = 0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Exact id only. Unknown ids are ignored: the request may just have ended."""

    request_id: str
    attempt: int = 0


class Committed(msgspec.Struct, frozen=True, kw_only=True, tag="committed"):
    """Front → engine: per (request, choice) how many output tokens are in the commit log.

    A sequence more than `CREDIT_WINDOW` tokens ahead of its log waits.
    """

    counts: tuple[tuple[str, int, int], ...]


CREDIT_WINDOW = 16


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag="frame", omit_defaults=True):
    """New output of one choice. `offset` is the index of tokens[0] in the choice's output.

    Exactly one frame per accepted request has `last=True`: its terminal event. A frame with
    `error` ends the request (choice is then the culprit or 0).
    `num_cached_tokens` counts prompt tokens that came from the prefix cache; `queue_ms` and `prefill_ms`
    tell how long this attempt waited and how long it then took to its first token.
    """

    request_id: str
    attempt: int = 0
    choice: int = 0
    offset: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    num_preemptions: int = 0
    last: bool = False


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag="frames"):
    """All output of one step, in the order it was produced, and the engine's state after it."""

    frames: tuple[Frame, ...]
    snapshot: EngineSnapshot


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Engine → front, also when idle, so that a silent engine can be told from an idle one."""

    snapshot: EngineSnapshot


class Pulse(msgspec.Struct, frozen=True, kw_only=True, tag="pulse"):
    """Engine → front every PULSE_S from the I/O thread, whatever the step thread does.

    (`step`, `layer`) is the progress: while `busy` it must advance, or the engine hangs. `predicted_ms` is
    what the running step was expected to take in all, `step_age_ms` how long it has run. A pulse that says
    nothing of progress is a sign of life of the process only.
    """

    step: int
    layer: int = 0
    busy: bool = False
    step_age_ms: float = 0.0
    predicted_ms: float = 0.0


PULSE_S = 0.5


class KvDelta(msgspec.Struct, frozen=True, kw_only=True, tag="kv_delta", omit_defaults=True):
    """Engine → front: pages (by digest) that became readable or were lost, in the order it happened.

    `seq` counts deltas of this connection from 0 without gaps; `reset` = `stored` is everything there is
    now and older knowledge is void (the first delta is one). Within one delta `removed` comes first.
    """

    seq: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    reset: bool = False
    tier: str = "device"


class KvSync(msgspec.Struct, frozen=True, kw_only=True, tag="kv_sync"):
    """Front → engine: a gap was seen; send a delta with `reset`."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """Front → engine: accept nothing new from me, finish what runs for me, then close the connection.

    An engine that its front started exits then; one that takes several fronts serves the others on.
    """


class StartProfile(msgspec.Struct, frozen=True, kw_only=True, tag="start_profile"):
    """Front → engine: record what you do from now on, within these bounds. An older engine skips it."""

    max_events: int
    max_s: float


class StopProfile(msgspec.Struct, frozen=True, kw_only=True, tag="stop_profile"):
    """Front → engine: answer with what was recorded, an empty recording if nothing was."""


class Profiled(msgspec.Struct, frozen=True, kw_only=True, tag="profiled"):
    """Engine → front: the answer to StopProfile. Nobody gets it unasked."""

    profile: ProcessProfile


FrontMessage = (
    Hello
    | Proof
    | Refused
    | Start
    | Attach
    | AssetRequest
    | Submit
    | Abort
    | Committed
    | KvSync
    | Drain
    | Fetch
    | Move
    | CancelTransfer
    | StartProfile
    | StopProfile
)
EngineMessage = (
    Hello
    | Proof
    | Refused
    | Progress
    | Ready
    | StartFailed
    | Asset
    | Frames
    | Stats
    | Pulse
    | KvDelta
    | Moved
    | Profiled
)
