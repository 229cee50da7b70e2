"""The sender's side of one simulated transfer: pages out one by one, the manifest, and faults on the way.

State, answers and the copying task; connections and silence are `transfers.py`'s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from xllm.engine.kvtransfer.base import Failed, Manifest, Pushed, Released, Sent, Slots
from xllm.engine.platform.null_runner import TokenPages
from xllm.errors import ErrorInfo
from xllm.simulation.network import Network
from xllm.simulation.transfer_messages import (
    CANCELLED,
    PEER_GONE,
    Accept,
    Cancel,
    Data,
    Done,
    End,
    Finish,
    Message,
    Refuse,
    Stopped,
    Tell,
    checksum,
)


class Outgoing:
    """The sender's side. `ready` are pages to copy, once `slots` says whereto; `manifest` = no more follow.

    Invariant: after `over` no page is read, so Released is true as soon as it is said.
    """

    def __init__(
        self,
        transfer_id: str,
        num_pages: tuple[int, ...],
        end: End,
        network: Network,
        memory: list[TokenPages],
        *,
        page_bytes: tuple[int, ...],
        tell: Tell,
        may_run: Callable[[], Awaitable[object]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.transfer_id = transfer_id
        self.end = end
        self.over = False
        self.heard_s = self.progress_s = self._loop.time()
        self._sender = end.route.answerer if end.peer == end.route.caller else end.route.caller
        self._network = network
        self._memory = memory
        self._page_bytes = page_bytes
        self._tell = tell
        self._may_run = may_run
        self._ready: deque[tuple[int, int, int]] = deque()
        self._slots: Slots | None = None
        self._manifest: Manifest | None = None
        self._checksums: dict[tuple[int, int], int] = {}
        self._wake = asyncio.Event()
        self._fault = network.next_fault()
        self._held_until_s = 0.0
        self._factor = 1.0
        self._num_offered = max(1, sum(num_pages))
        self._num_bytes = 0
        self._busy_s = 0.0
        self._finish_s = 0.0
        self._copying = 0
        self._finish_said = False

    @property
    def waits_for_peer(self) -> bool:
        """Whether the other side owes something: then silence and standstill count."""
        return self._slots is None or bool(self._ready) or self._manifest is not None

    @property
    def num_pending(self) -> int | None:
        """Pages that wait or are just being copied; None before the receiver's yes."""
        return None if self._slots is None else len(self._ready) + self._copying

    def push(self, pushed: Pushed) -> None:
        for group, (indices, pages) in enumerate(zip(pushed.indices, pushed.pages, strict=True)):
            self._ready.extend((group, i, p) for i, p in zip(indices, pages, strict=True))
        self.progress_s = self._loop.time()
        self._wake.set()

    def finish(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._finish_s = self.progress_s = self._loop.time()
        self._wake.set()

    def handle(self, message: Message) -> None:
        self.heard_s = self._loop.time()
        if self.over:
            if isinstance(message, Cancel):
                self.end.say(Stopped())
            return
        match message:
            case Accept(slots=slots):
                if self._slots is None:
                    self._slots = slots
                    self.progress_s = self.heard_s
                    self._wake.set()
            case Refuse(error=error):
                self._fail(error)
            case Done():
                self._sent()
            case Cancel():
                self.end.say(Stopped())
                self._fail(CANCELLED)
            case _:
                return

    def lost(self) -> None:
        """EOF."""
        if not self.over:
            self._fail(PEER_GONE)

    def give_up(self, error: ErrorInfo) -> None:
        if not self.over:
            self.end.say(Cancel())
            self._fail(error)

    def _sent(self) -> None:
        self.over = True
        exposed_s = self._loop.time() - self._finish_s
        self._tell(
            Sent(
                transfer_id=self.transfer_id,
                num_bytes=self._num_bytes,
                transfer_ms=self._busy_s * 1000,
                exposed_ms=exposed_s * 1000,
            )
        )
        self._tell(Released(transfer_id=self.transfer_id))
        self._wake.set()
        self.end.close()

    def _fail(self, error: ErrorInfo) -> None:
        self.over = True
        self._tell(Failed(transfer_id=self.transfer_id, error=error))
        self._tell(Released(transfer_id=self.transfer_id))
        self._wake.set()
        self.end.close()

    async def copy(self) -> None:
        """The I/O thread's part: one page after another, then the manifest."""
        while not self.over:
            self._inflict()
            if self._slots is not None and self._ready:
                self._copying = 1
                await self._copy_page(self._slots, *self._ready.popleft())
                self._copying = 0
            elif self._slots is not None and self._manifest is not None and not self._finish_said:
                sums = tuple((g, i, s) for (g, i), s in sorted(self._checksums.items()))
                self._finish_said = True
                self.end.say(Finish(self._manifest, sums))
            else:
                self._wake.clear()
                await self._wake.wait()
                await self._may_run()

    async def _copy_page(self, slots: Slots, group: int, index: int, page: int) -> None:
        num_bytes = self._page_bytes[group]
        begun_s = self._loop.time()
        await self._network.pass_bytes(self._sender, self.end.peer, num_bytes, self._factor)
        await asyncio.sleep(max(0.0, self._held_until_s - self._loop.time()))
        await self._may_run()
        if self.over:
            return
        content = self._memory[group][page].tobytes()
        right = checksum(content)
        self._checksums[group, index] = right
        self.progress_s = self._loop.time()
        self._num_bytes += num_bytes
        self._busy_s += self.progress_s - begun_s
        content = self._corrupted(content)
        if self._network.wire.one_sided:
            self._network.write(self.end.peer, group, slots[group][index], content)
            content = b""
        self.end.say(Data(group, index, content, right))

    # -- faults ---------------------------------------------------------------------------------------

    @property
    def _fraction(self) -> float:
        return 1.0 if self._finish_said else min(0.999, len(self._checksums) / self._num_offered)

    def _corrupted(self, content: bytes) -> bytes:
        fault = self._fault
        if fault is None or fault.kind != "corrupt":
            return content
        # The page that has just been counted is the one behind the fraction.
        if len(self._checksums) <= min(fault.fraction, 0.999) * self._num_offered:
            return content
        self._fault = None
        self._network.num_faults_hit += 1
        return bytes((content[0] ^ 1, *content[1:]))

    def _inflict(self) -> None:
        fault = self._fault
        if fault is None or fault.kind == "corrupt" or self._fraction < fault.fraction:
            return
        self._fault = None
        self._network.num_faults_hit += 1
        route, until_s = self.end.route, self._loop.time() + fault.lasts_s
        match fault.kind:
            case "cut":
                route.cut()
            case "stall":
                self._held_until_s = until_s
                route.hold(self.end.inbound, until_s)
                route.hold(self.end.outbound, until_s)
            case "stall_answers":
                route.hold(self.end.inbound, until_s)
            case "slow":
                self._factor = fault.factor
            case "repeat":
                self.end.outbound.num_to_repeat = 4
            case "call" if fault.call is not None:
                fault.call(self._sender, self.end.peer)
