"""What transfers tell, on its way from their thread to the step thread; a success reaches the front at once.

The step thread may be in a step of a hundred milliseconds, in which a request that holds still would wait for
nothing: everything that its front must have been told before has left already.
"""

from __future__ import annotations

from collections.abc import Mapping

from xllm.engine.core import EngineCore
from xllm.engine.kvtransfer.base import Sent, TransferEvent
from xllm.engine.port import Inbox, Port


class TransferNews:
    """Called by the transfers' thread. `fronts` belongs to the loop, which sets it; it is only read here."""

    def __init__(self, core: EngineCore, inbox: Inbox) -> None:
        self.fronts: Mapping[int, Port] = {}
        self._core = core
        self._inbox = inbox

    def __call__(self, event: TransferEvent) -> None:
        # Taken out first, so that the step thread does not answer a second time; told before the front, whose
        # next word must not overtake it.
        answer = self._core.mover.answer_early(event) if isinstance(event, Sent) else None
        self._inbox.put((None, event))
        port = None if answer is None else self.fronts.get(answer[0])
        if answer is not None and port is not None:
            port.send(answer[1])
