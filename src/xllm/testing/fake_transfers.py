"""Transfers between engines of one process: pages really are copied, and a test says when and how far.

Nothing happens by itself: `Wire.run` does what is due, one offer, answer or page at a time, so that a test
can stop, cut or corrupt a transfer at any point. Events wait in `FakeTransfers.events` until they are
handed on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from xllm.engine.kvtransfer.base import (
    Arrived,
    Asked,
    Failed,
    Manifest,
    Offered,
    Pushed,
    Released,
    Sent,
    Slots,
    TransferEvent,
)
from xllm.errors import ErrorInfo

Pages = Sequence[npt.NDArray[np.generic]]
"""By group: (page, anything)."""

CUT = ErrorInfo(kind="UnavailableError", code="transfer_cut", message="the test cut the transfer")
UNREACHABLE = ErrorInfo(kind="UnavailableError", code="unreachable", message="nobody is at these endpoints")
CANCELLED = ErrorInfo(kind="UnavailableError", code="transfer_cancelled", message="a side gave it up")


@dataclass(slots=True, eq=False)
class _Flow:
    """One transfer that the wire knows of."""

    transfer_id: str
    sender: FakeTransfers
    receiver: FakeTransfers
    slots: Slots | None = None
    ready: deque[tuple[int, int, int]] = field(default_factory=deque)
    """(group, index, page) that may be copied; …"""
    layered: list[tuple[int, int, int]] = field(default_factory=list)
    """… and those that the running step writes."""
    manifest: Manifest | None = None
    num_bytes: int = 0


class Wire:
    """All engines of a test. `num_copied` counts pages; `corrupt` names transfers whose check fails."""

    def __init__(self) -> None:
        self.ends: dict[str, FakeTransfers] = {}
        self.flows: dict[str, _Flow] = {}
        self.due: deque[Callable[[], None]] = deque()
        self.corrupt: set[str] = set()
        self.num_copied = 0

    def run(self, limit: int | None = None) -> int:
        """Do at most `limit` things that are due; how many were."""
        done = 0
        while limit is None or done < limit:
            if self.due:
                self.due.popleft()()
            elif not any(self._copy(flow) for flow in tuple(self.flows.values())):
                break
            done += 1
        return done

    def cut(self, transfer_id: str) -> bool:
        """The connection breaks: both sides hear of it, and nobody touches the pages any more."""
        flow = self.flows.pop(transfer_id, None)
        if flow is None:
            return False
        for end in (flow.sender, flow.receiver):
            end.fail(transfer_id, CUT)
        return True

    def _copy(self, flow: _Flow) -> bool:
        """One page, or the end; False where there is nothing to do."""
        if flow.slots is None:
            return False
        if flow.ready:
            g, index, page = flow.ready.popleft()
            flow.receiver.pages[g][flow.slots[g][index]] = flow.sender.pages[g][page]
            flow.num_bytes += flow.sender.pages[g][page].nbytes
            self.num_copied += 1
            return True
        if flow.manifest is None or flow.layered:
            return False
        del self.flows[flow.transfer_id]
        if flow.transfer_id in self.corrupt:
            for end in (flow.sender, flow.receiver):
                end.fail(flow.transfer_id, CUT)
            return True
        name, size = flow.transfer_id, flow.num_bytes
        flow.receiver.events.append(Arrived(transfer_id=name, manifest=flow.manifest, num_bytes=size))
        flow.receiver.events.append(Released(transfer_id=name))
        flow.sender.events.append(Sent(transfer_id=name, num_bytes=size, transfer_ms=1.0, exposed_ms=0.5))
        flow.sender.events.append(Released(transfer_id=name))
        return True


class FakeTransfers:
    """One engine's end of a `Wire`; implements `Transfers` over the arrays in `pages`."""

    def __init__(self, wire: Wire, name: str, pages: Pages) -> None:
        self.events: deque[TransferEvent] = deque()
        self.pages = pages
        self.endpoints = (f"fake:{name}",)
        self._wire = wire
        self._asked: dict[str, FakeTransfers] = {}
        wire.ends[self.endpoints[0]] = self

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        receiver = self._find(endpoints)
        if receiver is None or transfer_id in self._wire.flows:
            self._wire.due.append(lambda: self.fail(transfer_id, UNREACHABLE))
            return
        self._offer(transfer_id, receiver, num_pages)

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        flow = self._wire.flows.get(transfer_id)
        if flow is None:
            return
        pages = [
            (g, index, page)
            for g, group in enumerate(pushed.pages)
            for index, page in zip(pushed.indices[g], group, strict=True)
        ]
        if pushed.after_layer:
            flow.layered.extend(pages)
        else:
            flow.ready.extend(pages)

    def step_done(self) -> None:
        for flow in self._wire.flows.values():
            if flow.sender is self:
                flow.ready.extend(flow.layered)
                flow.layered.clear()

    def num_pending(self, transfer_id: str) -> int | None:
        flow = self._wire.flows.get(transfer_id)
        if flow is None or flow.slots is None:
            return None
        return len(flow.ready) + len(flow.layered)

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        flow = self._wire.flows.get(transfer_id)
        if flow is not None:
            flow.manifest = manifest

    def accept(self, transfer_id: str, slots: Slots) -> None:
        def accepted() -> None:
            flow = self._wire.flows.get(transfer_id)
            if flow is not None:
                flow.slots = slots
            else:
                self.fail(transfer_id, CUT)

        self._wire.due.append(accepted)

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        asker = self._asked.pop(transfer_id, None)
        flow = self._wire.flows.pop(transfer_id, None)
        if asker is not None:
            self._wire.due.append(lambda: asker.fail(transfer_id, error))
        elif flow is not None:
            self._wire.due.append(lambda: flow.sender.fail(transfer_id, error))

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        source = self._find(endpoints)
        if source is None:
            self._wire.due.append(lambda: self.fail(transfer_id, UNREACHABLE))
            return

        def ask() -> None:
            source._asked[transfer_id] = self
            source.events.append(Asked(transfer_id=transfer_id, root=root, digests=digests))

        self._wire.due.append(ask)

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        asker = self._asked.pop(transfer_id, None)
        if asker is None:
            self._wire.due.append(lambda: self.fail(transfer_id, CANCELLED))
            return
        self._offer(transfer_id, asker, tuple(len(group) for group in pushed.pages))
        self.push(transfer_id, pushed)
        self.finish(transfer_id, manifest)

    def cancel(self, transfer_id: str) -> None:
        flow = self._wire.flows.pop(transfer_id, None)
        for end in self._wire.ends.values():
            if end._asked.get(transfer_id) is self:
                del end._asked[transfer_id]

        def released() -> None:
            self.events.append(Released(transfer_id=transfer_id))
            if flow is not None:
                other = flow.receiver if flow.sender is self else flow.sender
                other.fail(transfer_id, CANCELLED)

        self._wire.due.append(released)

    def close(self) -> None:
        self._wire.ends.pop(self.endpoints[0], None)

    def fail(self, transfer_id: str, error: ErrorInfo) -> None:
        self.events.append(Failed(transfer_id=transfer_id, error=error))
        self.events.append(Released(transfer_id=transfer_id))

    def _find(self, endpoints: tuple[str, ...]) -> FakeTransfers | None:
        return next((self._wire.ends[e] for e in endpoints if e in self._wire.ends), None)

    def _offer(self, transfer_id: str, receiver: FakeTransfers, num_pages: tuple[int, ...]) -> None:
        self._wire.flows[transfer_id] = _Flow(transfer_id, self, receiver)
        self._wire.due.append(
            lambda: receiver.events.append(Offered(transfer_id=transfer_id, num_pages=num_pages))
        )
