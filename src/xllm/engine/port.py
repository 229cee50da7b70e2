"""What the step thread knows of a session, and the queue by which messages of all sessions reach it.

Contracts only: `session` and `hub` implement them over sockets, tests in memory.
"""

from __future__ import annotations

import queue
from typing import Protocol

from xllm.engine.kvtransfer.base import TransferEvent
from xllm.wire.messages import EngineMessage, FrontMessage


class Port(Protocol):
    """`number` owns the session's requests and is never used twice; `version` is what both sides speak."""

    number: int
    version: int
    pulsing: bool

    def send(self, message: EngineMessage) -> None:
        """Hand over the message; never blocks."""

    def took(self) -> None:
        """A message of this session was dealt with."""

    def end(self) -> None:
        """Close once all that was sent has been written."""


Item = tuple[Port | None, FrontMessage | TransferEvent | None]
"""(port, message), in order of arrival; (port, None) = it is gone. (None, Drain) and (None, None) come from
within: drain, or stop; (None, event) from the transfers."""

Inbox = queue.SimpleQueue[Item]
