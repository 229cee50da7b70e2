"""The receiving side of one transfer: leased slots, what came into them, and whether it is right.

A peer's numbers are checked here before anything is touched. No sockets, no clock, no events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from xllm.engine.kvtransfer.base import Manifest, Slots
from xllm.engine.kvtransfer.connection import Connection
from xllm.engine.kvtransfer.copying import RunningDigests, page_digests, scatter
from xllm.engine.kvtransfer.memory import KVMemory
from xllm.engine.kvtransfer.messages import Data, Finish, Passed, Way, Wrote
from xllm.errors import RequestError

MAX_TOKEN = 1 << 31
MAX_DIGEST_BYTES = 64
_manifests: msgspec.msgpack.Decoder[Manifest] = msgspec.msgpack.Decoder(Manifest)


class Phase(Enum):
    OFFERED = 1
    LEASED = 2
    CHECKING = 3
    """All was announced; what a one-sided way has brought is not yet seen."""
    GIVEN_UP = 4
    """Waits for the sender's word that it does not write any more."""


def refused(message: str, code: str = "transfer_invalid") -> RequestError:
    return RequestError(message, code=code)


@dataclass(slots=True, eq=False)
class Incoming:
    transfer_id: str
    memory: KVMemory
    num_pages: tuple[int, ...]
    connection: Connection
    phase: Phase = Phase.OFFERED
    slots: Slots = ()
    way: Way = "stream"
    mentioned_s: float = 0.0
    """When the sender last showed that it still means to send."""
    finish: Finish | None = None
    manifest: Manifest | None = None
    check_until_s: float = 0.0
    _right: dict[tuple[int, int], int] = field(default_factory=dict)
    """Pages whose content had this digest when it was last looked at."""
    _running: RunningDigests = field(default_factory=RunningDigests)

    def lease(self, slots: Slots, way: Way) -> None:
        """Raises RequestError for slots that cannot be meant."""
        groups = self.memory.groups
        fits = len(slots) == len(groups) and all(
            len(s) == n and len(set(s)) == n and all(0 <= slot < group.num_pages for slot in s)
            for s, n, group in zip(slots, self.num_pages, groups, strict=True)
        )
        if not fits:
            raise refused("the leased pages are not what was offered")
        self.slots, self.way, self.phase = slots, way, Phase.LEASED

    @property
    def one_sided(self) -> bool:
        """The sender may write without our having a say."""
        return self.way != "stream" and self.phase is not Phase.OFFERED

    def take(self, data: Data, payload: memoryview) -> None:
        """Put the bytes where they belong. Raises RequestError for what is not within the lease."""
        if self.phase is not Phase.LEASED or self.way != "stream":
            raise refused("data for pages that are not leased")
        slots = self._slots(data.group, data.indices)
        page_bytes = self.memory.groups[data.group].page_bytes
        if not 0 <= data.offset <= data.offset + data.length <= page_bytes:
            raise refused("data beyond the end of a page")
        if data.length <= 0 or len(payload) != data.length * len(slots):
            raise refused("data of another length than announced")
        for index in data.indices:
            self._right.pop((data.group, index), None)
        scatter(self.memory.groups[data.group].pages, slots, data.offset, data.length, payload)

    def passed(self, passed: Passed) -> None:
        """Go on with the digests of pages of which another layer has come."""
        slots = self._slots(passed.group, passed.indices)
        group = self.memory.groups[passed.group]
        if not 0 <= passed.layer < len(group.spans):
            raise refused("a layer that does not exist")
        self._running.add(passed.group, group, passed.indices, slots, passed.layer)

    def look(self, wrote: Wrote) -> None:
        """Check pages early. Wrong ones are not held against the sender before the end: it may be at them."""
        slots = self._slots(wrote.group, wrote.indices)
        if len(wrote.digests) != len(slots):
            raise refused("as many digests as pages")
        group = self.memory.groups[wrote.group]
        for index, slot, said in zip(wrote.indices, slots, wrote.digests, strict=True):
            right = self._running.take(wrote.group, group, index) == said
            if right or page_digests(group, (slot,))[0] == said:
                self._right[wrote.group, index] = said
            else:
                self._right.pop((wrote.group, index), None)

    def end(self, finish: Finish) -> None:
        """Nothing follows. Raises RequestError for a manifest that cannot be meant."""
        if self.phase is not Phase.LEASED:
            raise refused("the end of what is not under way")
        if len(finish.digests) != len(self.memory.groups):
            raise refused("digests of other groups than there are")
        sent = [{index for index, _ in group} for group in finish.digests]
        for g, indices in enumerate(sent):
            self._slots(g, tuple(indices))
        self.manifest = decode_manifest(finish.manifest, sent)
        self.finish, self.phase = finish, Phase.CHECKING

    def wrong_pages(self) -> int:
        """Pages that are not what the sender says it sent; looks again at those that were not right."""
        if self.finish is None:
            raise refused("nothing has ended")
        wrong = 0
        for g, said in enumerate(self.finish.digests):
            open_ = [(index, digest) for index, digest in said if self._right.get((g, index)) != digest]
            slots = [self.slots[g][index] for index, _ in open_]
            for (index, digest), found in zip(open_, page_digests(self.memory.groups[g], slots), strict=True):
                if found == digest:
                    self._right[g, index] = digest
                else:
                    wrong += 1
        return wrong

    def _slots(self, g: int, indices: tuple[int, ...]) -> tuple[int, ...]:
        if not 0 <= g < len(self.slots) or any(not 0 <= i < len(self.slots[g]) for i in indices):
            raise refused("a page beyond the lease")
        slots = self.slots[g]
        return tuple(slots[i] for i in indices)


def decode_manifest(raw: bytes, sent: list[set[int]]) -> Manifest:
    """Checked as far as it can be without knowing the request. Raises RequestError."""
    try:
        manifest = _manifests.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise refused("not a manifest") from error
    for choice in manifest.choices:
        # A prefix lists its pages by name, so its choice has none.
        pages_known = (
            (bool(manifest.digests) and not choice.pages)
            or len(choice.pages) == len(sent)
            and all(
                page == -1 or page in known
                for table, known in zip(choice.pages, sent, strict=True)
                for page in table
            )
        )
        tokens_possible = all(0 <= token < MAX_TOKEN for token in choice.tokens)
        counts_possible = 0 <= manifest.num_prompt <= len(choice.tokens) and 0 <= choice.num_computed <= len(
            choice.tokens
        )
        if not pages_known or not tokens_possible or not counts_possible:
            raise refused("a manifest of something else")
    if any(len(d) > MAX_DIGEST_BYTES for d in (manifest.root, *manifest.digests)):
        raise refused("a manifest with impossible names")
    return manifest
