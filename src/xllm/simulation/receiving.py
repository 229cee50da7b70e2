"""The receiver's side of one simulated transfer: what was promised, what has come, when a lease may go.

State and answers; tasks, time limits and connections are `transfers.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xllm.engine.kvtransfer.base import Arrived, Failed, Offered, Released, Slots
from xllm.engine.platform.null_runner import TokenPages
from xllm.errors import ErrorInfo
from xllm.simulation.transfer_messages import (
    CANCELLED,
    CORRUPT,
    PEER_GONE,
    Accept,
    Cancel,
    Data,
    Done,
    End,
    Finish,
    Message,
    Offer,
    Refuse,
    Stopped,
    Tell,
    checksum,
)


class Incoming:
    """The receiver's side. `slots` are leased from Offered's answer until Released is said.

    Invariant: with one-sided writes Released waits for the sender's word, or for its end.
    """

    def __init__(
        self,
        transfer_id: str,
        end: End,
        memory: list[TokenPages],
        *,
        one_sided: bool,
        tell: Tell,
        now_s: Callable[[], float],
    ) -> None:
        self.transfer_id = transfer_id
        self.end = end
        self.slots: Slots | None = None
        self.offered = False
        self.over = False
        self.released = False
        self.heard_s = now_s()
        self._memory = memory
        self._one_sided = one_sided
        self._tell = tell
        self._now_s = now_s
        self._come: set[tuple[int, int]] = set()

    def accept(self, slots: Slots) -> None:
        if self.over or self.slots is not None:
            return
        self.slots = slots
        self.end.say(Accept(slots))

    def handle(self, message: Message) -> None:
        self.heard_s = self._now_s()
        match message:
            case Cancel() | Stopped() if not self.released:
                if not self.over:
                    self._tell(Failed(transfer_id=self.transfer_id, error=CANCELLED))
                self._release()
            case _ if self.over:
                return
            case Offer(num_pages=num_pages) if not self.offered:
                self.offered = True
                self._tell(Offered(transfer_id=self.transfer_id, num_pages=num_pages))
            case Refuse(error=error):
                self._tell(Failed(transfer_id=self.transfer_id, error=error))
                self._release()
            case Data():
                self._take(message)
            case Finish():
                self._finish(message)
            case _:
                return

    def lost(self) -> None:
        """EOF: whoever wrote is gone."""
        if not self.over:
            self._tell(Failed(transfer_id=self.transfer_id, error=PEER_GONE))
        if not self.released:
            self._release()

    def give_up(self, error: ErrorInfo) -> None:
        if self.over:
            return
        self.over = True
        self._tell(Failed(transfer_id=self.transfer_id, error=error))
        self.end.say(Cancel())
        if not self._one_sided or self.slots is None:
            self._release()

    def refuse(self, error: ErrorInfo) -> None:
        if not self.over and self.slots is None:
            self.end.say(Refuse(error))
            self._release()

    def _take(self, data: Data) -> None:
        slot = self._slot(data.group, data.index)
        if slot is None or (data.group, data.index) in self._come:
            return
        if not self._one_sided:
            if checksum(data.content) != data.checksum:
                self.give_up(CORRUPT)
                return
            self._memory[data.group][slot] = np.frombuffer(data.content, dtype=np.int32)
        self._come.add((data.group, data.index))

    def _finish(self, finish: Finish) -> None:
        if self.slots is None:
            return
        for group, index, right in finish.checksums:
            slot = self._slot(group, index)
            if slot is None or checksum(self._memory[group][slot].tobytes()) != right:
                self.give_up(CORRUPT)
                return
        self.end.say(Done())
        self.over = True
        num_bytes = sum(self._memory[g][0].nbytes for g, _, _ in finish.checksums)
        self._tell(Arrived(transfer_id=self.transfer_id, manifest=finish.manifest, num_bytes=num_bytes))
        self._release()

    def _slot(self, group: int, index: int) -> int | None:
        if self.slots is None or not 0 <= group < len(self.slots):
            return None
        return self.slots[group][index] if 0 <= index < len(self.slots[group]) else None

    def _release(self) -> None:
        self.over = self.released = True
        self._tell(Released(transfer_id=self.transfer_id))
        self.end.close()
