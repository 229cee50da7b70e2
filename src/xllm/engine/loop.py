"""The step thread's loop: messages in, steps, frames out. The same over a socket or in memory.

One owner of the core. Every error of one request becomes that request's terminal frame; only a lost
front or a lost device ends the loop.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Mapping

from xllm.engine.core import EngineCore
from xllm.errors import ErrorInfo, XllmError
from xllm.types import FinishReason
from xllm.wire.messages import (
    Abort,
    Asset,
    AssetRequest,
    Committed,
    Drain,
    EngineMessage,
    Frame,
    Frames,
    FrontMessage,
    Stats,
    Submit,
)

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""An idle engine says so this often; a silent one is suspect."""


class EngineLoop:
    def __init__(
        self,
        core: EngineCore,
        assets: Mapping[str, bytes],
        inbox: queue.SimpleQueue[FrontMessage | None],
        send: Callable[[EngineMessage], None],
    ) -> None:
        """`assets` maps digest → bytes."""
        self._core = core
        self._assets = assets
        self._inbox = inbox
        self._send = send
        self._refused: list[Frame] = []
        self._draining = False

    def run(self) -> None:
        """Until the front is gone, or drained and idle. Every accepted request has ended then."""
        ran = False
        while self._take_messages(may_wait=not ran):
            ran, frames = self._core.step()
            frames = (*self._refused, *frames)
            self._refused = []
            if frames:
                self._send(Frames(frames=frames, snapshot=self._core.snapshot()))
            if self._draining and not self._core.has_requests:
                return
        self._core.abort_all()
        self._core.step()

    def _take_messages(self, may_wait: bool) -> bool:
        """Handle what has arrived, waiting for the first if nothing could run; False = front gone.

        Requests may be alive and yet nothing can run: all wait for the front's commit log.
        """
        while True:
            try:
                message = self._inbox.get(block=may_wait, timeout=HEARTBEAT_S)
            except queue.Empty:
                if not may_wait:
                    return True
                self._send(Stats(snapshot=self._core.snapshot()))
                continue
            if message is None:
                return False
            self._handle(message)
            may_wait = False

    def _handle(self, message: FrontMessage) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort(request_id=request_id):
                self._core.abort(request_id)
            case Committed(counts=counts):
                for request_id, choice, num_tokens in counts:
                    self._core.scheduler.committed(request_id, choice, num_tokens)
            case AssetRequest(digest=digest):
                self._send(Asset(digest=digest, data=self._assets.get(digest)))
            case Drain():
                self._draining = True
                self._core.drain()
            case _:
                return  # a Hello or Start after the hand-shake says nothing new

    def _submit(self, message: Submit) -> None:
        spec = message.spec
        try:
            self._core.submit(spec)
        except XllmError as error:
            self._refuse(message, error.info())
        except Exception:
            # A request that trips a bug of ours must not take the engine with it.
            log.exception("a request could not be taken")
            self._refuse(message, _REFUSED)

    def _refuse(self, message: Submit, info: ErrorInfo) -> None:
        self._refused.append(
            Frame(
                request_id=message.spec.request_id,
                attempt=message.spec.attempt,
                finish_reason=FinishReason.ERROR,
                error=info,
                last=True,
            )
        )


_REFUSED = ErrorInfo(
    kind="InternalError", code="internal_error", message="the engine could not take the request"
)
