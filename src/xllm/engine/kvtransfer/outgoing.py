"""The sending side of one transfer: what is to be copied, in which order, and what was.

Jobs stand in one queue, so a page's digest is taken after its last copy and Finish leaves after everything.
How bytes travel is a `Writer`'s matter; sockets, time limits and events are `plane`'s.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from xllm.engine.kvtransfer.base import Manifest, Pushed
from xllm.engine.kvtransfer.connection import Connection
from xllm.engine.kvtransfer.copying import RunningDigests, page_digests
from xllm.engine.kvtransfer.memory import GroupMemory, KVMemory
from xllm.engine.kvtransfer.messages import Accept, Finish, Message, Passed, Wrote
from xllm.errors import InternalError, XllmError

PIECE_BYTES = 1 << 20
"""Copied in one go: short enough that a socket or a cancel does not wait for it."""

_DIGESTS_AT_ONCE = 64

MOONCAKE_SPAN_BYTES = 96 << 10
"""Each write costs it as much as so many bytes, and the peer as well: fewer layers at a time do not pay."""


class Step(Enum):
    CONNECTING = 1
    OFFERED = 2
    ACCEPTED = 3
    FINISHED = 4


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [offset, offset + length) of pages of one group."""

    group: int
    indices: tuple[int, ...]
    pages: tuple[int, ...]
    offset: int
    length: int

    @property
    def num_bytes(self) -> int:
        return len(self.indices) * self.length


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of these pages has been copied: go on with their digests, and let the receiver do so."""

    group: int
    indices: tuple[int, ...]
    pages: tuple[int, ...]
    layer: int


@dataclass(frozen=True, slots=True)
class _Seal:
    """All parts of these pages have been copied: tell their digests. `by_layer`: they have been taken."""

    group: int
    indices: tuple[int, ...]
    pages: tuple[int, ...]
    by_layer: bool = False


@dataclass(slots=True)
class _Layered:
    """Pages that the running step writes; layers < `num_layers` of each group are in the queue."""

    pushed: Pushed
    num_layers: list[int]


@dataclass(slots=True)
class Backlog:
    """What a step thread may ask of its transfer at any time, in pages and parts of pages. `num_pushed` is
    written by it, the rest by the I/O thread."""

    num_pushed: int = 0
    num_copied: float = 0.0
    num_unsent: float = 0.0
    """Copied, but only as far as our side of a socket."""
    accepted: bool = False
    ended: bool = False

    @property
    def num_pending(self) -> int:
        # Sums of parts of a page are not quite whole.
        return max(0, math.ceil(self.num_pushed - self.num_copied + self.num_unsent - 1e-6))


Writer = Callable[["Outgoing", Part, tuple[int, ...]], None]
"""Copies a part into these slots of the receiver, or sends it off; raises XllmError."""


@dataclass(slots=True, eq=False)
class Outgoing:
    transfer_id: str
    memory: KVMemory
    num_pages: tuple[int, ...]
    backlog: Backlog = field(default_factory=Backlog)
    endpoints: deque[str] = field(default_factory=deque)
    step: Step = Step.CONNECTING
    connection: Connection | None = None
    accepted: Accept | None = None
    since_s: float = 0.0
    """When the present step began."""
    finish_s: float = 0.0
    """When the step thread had nothing more to push."""
    num_bytes: int = 0
    moving_s: float = 0.0
    finishing: bool = False
    in_flight: bool = False
    """A part is with mooncake; nothing may follow, end or be released before it is back."""
    in_flight_s: float = 0.0
    """Since when."""
    given_up: bool = False
    failure: XllmError | None = None
    on_quiet: Callable[[], None] | None = None
    """What is due when nothing is in flight any more."""
    _jobs: deque[Part | _Layer | _Seal | Finish] = field(default_factory=deque)
    _layered: list[_Layered] = field(default_factory=list)
    _digests: dict[tuple[int, int], int] = field(default_factory=dict)
    _running: RunningDigests = field(default_factory=RunningDigests)

    # -- from the step thread's calls ----------------------------------------------------------------

    def push(self, pushed: Pushed) -> None:
        """Raises InternalError for pages that do not exist or were not offered."""
        self._check(pushed)
        if pushed.after_layer:
            self._layered.append(_Layered(pushed, [0] * len(self.memory.groups)))
            return
        for g, (indices, pages) in enumerate(zip(pushed.indices, pushed.pages, strict=True)):
            self._copy(g, indices, pages, 0, self.memory.groups[g].page_bytes)
            self._seal(g, indices, pages)

    def step_done(self, trusted: bool) -> None:
        """All layers are written. Not `trusted`: what was copied meanwhile may be of an earlier try."""
        layered, self._layered = self._layered, []
        for entry in layered:
            pushed = entry.pushed
            for g, (indices, pages) in enumerate(zip(pushed.indices, pushed.pages, strict=True)):
                group, copied = self.memory.groups[g], entry.num_layers[g] if trusted else 0
                if not trusted and group.separable:
                    # It counts once, although it is copied twice.
                    self.backlog.num_copied -= len(pages) * entry.num_layers[g] / len(group.layers)
                if not copied:
                    self._copy(g, indices, pages, 0, group.page_bytes)
                if copied:
                    self._copy_layers(g, indices, pages, copied, len(group.spans))
                self._seal(g, indices, pages, by_layer=bool(copied))

    def layers_done(self, finished: int) -> None:
        """The running step has finished so many of the model's layers."""
        for entry in self._layered:
            for g, group in enumerate(self.memory.groups):
                queued, ready = entry.num_layers[g], bisect_left(group.layers, finished)
                if group.separable and self._pays(group, ready - queued, len(group.layers) - queued):
                    self._copy_layers(g, entry.pushed.indices[g], entry.pushed.pages[g], queued, ready)
                    entry.num_layers[g] = ready

    def _pays(self, group: GroupMemory, ready: int, left: int) -> bool:
        """Half of the layers that are left, then half of those: few pieces, and little after the step."""
        least = MOONCAKE_SPAN_BYTES if self.accepted and self.accepted.way == "mooncake" else 0
        return ready > 0 and 2 * ready >= left and ready * group.span_bytes >= least

    def finish(self, manifest: Manifest, at_s: float) -> None:
        self.step_done(False)
        self.finish_s = at_s
        self.finishing = True
        self._jobs.append(
            Finish(
                transfer_id=self.transfer_id,
                digests=(),
                manifest=msgspec.msgpack.encode(manifest),
                num_bytes=0,
            )
        )

    @property
    def watches_layers(self) -> bool:
        return bool(self._layered)

    @property
    def has_jobs(self) -> bool:
        return self.step is Step.ACCEPTED and bool(self._jobs) and not self.in_flight

    # -- from the I/O loop ----------------------------------------------------------------------------

    def work(self, write: Writer, say: Callable[[Message], None]) -> int:
        """Do the next job; bytes that it copied or sent off."""
        job = self._jobs.popleft()
        if isinstance(job, Part):
            write(self, job, self._slots(job.group, job.indices))
            self.num_bytes += job.num_bytes
            self.backlog.num_copied += job.num_bytes / self.memory.groups[job.group].page_bytes
            return job.num_bytes
        if isinstance(job, _Layer):
            group = self.memory.groups[job.group]
            self._running.add(job.group, group, job.indices, job.pages, job.layer)
            say(Passed(transfer_id=self.transfer_id, group=job.group, indices=job.indices, layer=job.layer))
            return 0
        if isinstance(job, _Seal):
            digests = self._sealed(job)
            self._digests.update(zip(((job.group, i) for i in job.indices), digests, strict=True))
            say(Wrote(transfer_id=self.transfer_id, group=job.group, indices=job.indices, digests=digests))
            return len(job.pages) * self.memory.groups[job.group].page_bytes
        say(msgspec.structs.replace(job, digests=self._all_digests(), num_bytes=self.num_bytes))
        self.step = Step.FINISHED
        return 0

    def _sealed(self, job: _Seal) -> tuple[int, ...]:
        group = self.memory.groups[job.group]
        found = [self._running.take(job.group, group, i) if job.by_layer else None for i in job.indices]
        return tuple(
            page_digests(group, (page,))[0] if digest is None else digest
            for page, digest in zip(job.pages, found, strict=True)
        )

    def _all_digests(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        by_group: list[list[tuple[int, int]]] = [[] for _ in self.memory.groups]
        for (g, index), digest in sorted(self._digests.items()):
            by_group[g].append((index, digest))
        return tuple(map(tuple, by_group))

    def _slots(self, g: int, indices: Sequence[int]) -> tuple[int, ...]:
        if self.accepted is None:
            raise InternalError("a part is sent before its transfer was accepted")
        slots = self.accepted.slots[g]
        return tuple(slots[i] for i in indices)

    def _copy(self, g: int, indices: Sequence[int], pages: Sequence[int], offset: int, length: int) -> None:
        """In pieces. What is copied again has no digest until it is sealed again."""
        if not length:
            return
        many = max(1, PIECE_BYTES // length)
        for at in range(0, len(indices), many):
            some = tuple(indices[at : at + many]), tuple(pages[at : at + many])
            for part in range(0, length, PIECE_BYTES):
                self._jobs.append(Part(g, *some, offset + part, min(PIECE_BYTES, length - part)))

    def _copy_layers(
        self, g: int, indices: Sequence[int], pages: Sequence[int], first: int, end: int
    ) -> None:
        for offset, length in self.memory.groups[g].stretches(first, end):
            self._copy(g, indices, pages, offset, length)
        for layer in range(first, end):
            self._jobs.append(_Layer(g, tuple(indices), tuple(pages), layer))

    def _seal(self, g: int, indices: Sequence[int], pages: Sequence[int], by_layer: bool = False) -> None:
        many = min(_DIGESTS_AT_ONCE, max(1, PIECE_BYTES // self.memory.groups[g].page_bytes))
        for at in range(0, len(indices), many):
            end = at + many
            self._jobs.append(_Seal(g, tuple(indices[at:end]), tuple(pages[at:end]), by_layer))

    def _check(self, pushed: Pushed) -> None:
        groups = self.memory.groups
        if not len(pushed.indices) == len(pushed.pages) == len(groups) == len(self.num_pages):
            raise InternalError("pages of other groups than there are")
        for g, (indices, pages) in enumerate(zip(pushed.indices, pushed.pages, strict=True)):
            if len(indices) != len(pages):
                raise InternalError("as many indices as pages are to be pushed")
            if any(not 0 <= i < self.num_pages[g] for i in indices):
                raise InternalError("more pages are pushed than were offered")
            if any(not 0 <= p < groups[g].num_pages for p in pages):
                raise InternalError("a page is pushed that does not exist")
