"""What the step thread asks of the transfers, and what they tell it: plain values and one protocol.

Pages belong to the step thread. It leases and pins them, says which are complete, and frees them when it is
told that nobody touches them any more. Threads, sockets and copies are the backends' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from xllm.errors import ErrorInfo

Slots = tuple[tuple[int, ...], ...]
"""Page numbers by KV group, in the order of the sender's list: `slots[g][i]` receives its i-th page of g."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceState:
    """One sequence of the request at the moment it held still.

    `tokens` are all of it, prompt first; `pages[g][i]` is an index into the sender's list of group g (−1 =
    freed, outside the group's window); KV of positions < `num_computed` is complete in them.
    """

    choice: int
    tokens: tuple[int, ...]
    num_computed: int
    pages: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a receiver needs to go on: `choices` that have not ended.

    For a prefix `digests` names the pages behind `root` in order; the one entry of `choices` has their
    tokens, so that the receiver compares tokens and not names only. A group's list may begin later than
    the chain (window): it always ends with it.
    """

    num_prompt: int
    choices: tuple[ChoiceState, ...] = ()
    root: bytes = b""
    digests: tuple[bytes, ...] = ()


# -- from the transfers to the step thread, through its inbox -------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A peer wants to send at most `num_pages[g]` pages; answer with `accept` or `refuse`."""

    transfer_id: str
    num_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A peer wants to fetch: what a pull Move keeps under this id, or (`digests`) cached pages of a prefix.
    Answer with `give` or `refuse`."""

    transfer_id: str
    root: bytes = b""
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """All pages are in the leased slots, their checksums are right."""

    transfer_id: str
    manifest: Manifest
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """The receiver has said that everything arrived."""

    transfer_id: str
    num_bytes: int = 0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Either side: it will not end well. Pages stay leased or pinned until `Released`."""

    transfer_id: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Either side, always the last word: nobody reads or writes the pages of this transfer any more.

    Follows Sent, Failed and a cancel; of a receiver's Arrived it comes with it.
    """

    transfer_id: str


TransferEvent = Offered | Asked | Arrived | Sent | Failed | Released


# -- from the step thread to the transfers ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """Pages to be copied: `indices[g]` of the sender's list are the pages `pages[g]`.

    `after_layer`: False = they are complete. True = the step that begins now writes them; a layer may be
    read once the step's progress word has passed it, all of them when `step_done` is called.
    """

    indices: Slots
    pages: Slots
    after_layer: bool = False


class Transfers(Protocol):
    """Owned by the engine. All calls come from the step thread, return at once and never raise; whatever
    goes wrong is a Failed."""

    @property
    def endpoints(self) -> tuple[str, ...]: ...

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        """Connect to the first that can be reached, and offer. Pushes may follow at once; they wait for
        the receiver's yes."""

    def push(self, transfer_id: str, pushed: Pushed) -> None: ...

    def step_done(self) -> None:
        """The step that `after_layer` pushes spoke of has ended: all its layers are written."""

    def num_pending(self, transfer_id: str) -> int | None:
        """Of a sender: pushed pages that are not copied yet, what was copied layer by layer counted in
        proportion and rounded up; None while the receiver has not said yes, or when nothing is sent under
        that id. Read between steps, so cheap; it may be a moment old."""

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        """Nothing more is pushed. Ends in Sent or Failed."""

    def accept(self, transfer_id: str, slots: Slots) -> None:
        """Answer to Offered: the leased pages."""

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        """Answer to Offered or Asked."""

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        """Connect and ask. The peer then offers as with a push: Offered, Arrived … follow."""

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        """Answer to Asked: push all of it at once and finish."""

    def cancel(self, transfer_id: str) -> None:
        """Give it up, on whichever side; Released follows within a second, or when a silent peer is gone."""

    def close(self) -> None: ...
