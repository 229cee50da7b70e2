"""An engine as the front sees it: one connection to one incarnation of it.

Owns the connection's two tasks. Sending never blocks the caller: the outbox is bounded by the
requests that the router lets onto the instance (one Submit, one Abort, one commit count per
choice each). Decides nothing: frames and the loss of the peer are handed to the front.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from xllm.errors import UnavailableError
from xllm.types import EngineSnapshot, ModelCard
from xllm.wire.codec import WireError
from xllm.wire.messages import (
    Asset,
    AssetRequest,
    Committed,
    EngineMessage,
    Frame,
    Frames,
    FrontMessage,
    KvDelta,
    Pulse,
    Stats,
)
from xllm.wire.stream import EngineStream

log = logging.getLogger(__name__)


class Instance:
    """`alive` goes from True to False once. `requests` is written by the front only."""

    def __init__(
        self, stream: EngineStream, card: ModelCard, *, name: str, max_reqs: int | None = None
    ) -> None:
        self.name = name
        self.card = card
        self.max_reqs = max_reqs
        self.alive = True
        self.snapshot = EngineSnapshot(total_pages=card.num_pages, free_pages=card.num_pages)
        self.requests: set[str] = set()
        self._stream = stream
        self._outbox: list[FrontMessage] = []
        self._commits: dict[tuple[str, int], int] = {}
        self._assets: dict[str, asyncio.Future[bytes | None]] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._on_frame: Callable[[Instance, Frame], None] = _ignore_frame
        self._on_lost: Callable[[Instance], None] = _ignore_lost

    def start(
        self, *, on_frame: Callable[[Instance, Frame], None], on_lost: Callable[[Instance], None]
    ) -> None:
        """Begin reading and writing. Both callbacks run on the loop; `on_lost` runs at most once."""
        self._on_frame, self._on_lost = on_frame, on_lost
        self._tasks = [
            asyncio.create_task(self._read(), name=f"read {self.name}"),
            asyncio.create_task(self._write(), name=f"write {self.name}"),
        ]

    def post(self, message: FrontMessage) -> None:
        """Send soon, in order. Nothing is queued for a peer that is gone."""
        if self.alive:
            self._outbox.append(message)
            self._wake.set()

    def commit(self, request_id: str, choice: int, count: int) -> None:
        """Tell the engine the length of a choice's log; counts of one loop tick travel together."""
        if self.alive:
            self._commits[request_id, choice] = count
            self._wake.set()

    def forget(self, request_id: str, num_choices: int) -> None:
        """Drop unsent commits of a request that has ended."""
        for choice in range(num_choices):
            self._commits.pop((request_id, choice), None)

    async def fetch(self, digest: str) -> bytes:
        """The asset's bytes. UnavailableError when the engine lacks it or is lost meanwhile."""
        if digest not in self._assets:
            self._assets[digest] = asyncio.get_running_loop().create_future()
            self.post(AssetRequest(digest=digest))
        data = await asyncio.shield(self._assets[digest]) if self.alive else None
        if data is None:
            raise UnavailableError("the engine does not have a text asset of its model")
        return data

    async def close(self) -> None:
        """End the connection; the instance counts as lost afterwards, without a callback."""
        self._on_lost = _ignore_lost
        self._lose()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stream.close()

    def _lose(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._outbox.clear()
        self._commits.clear()
        for waiting in self._assets.values():
            if not waiting.done():
                waiting.set_result(None)
        self._wake.set()
        self._on_lost(self)

    async def _read(self) -> None:
        try:
            while (message := await self._stream.receive()) is not None:
                self._dispatch(message)
        except WireError:
            log.exception("instance %s broke the wire protocol; closing it", self.name)
        except ConnectionError:
            log.warning("instance %s: connection lost", self.name)
        except Exception:
            # A bug of ours: without a reader the requests would hang, so they end instead.
            log.exception("instance %s: reading failed; closing it", self.name)
        finally:
            self._lose()

    def _dispatch(self, message: EngineMessage) -> None:
        if isinstance(message, Frames):
            self.snapshot = message.snapshot
            for frame in message.frames:
                self._on_frame(self, frame)
        elif isinstance(message, Stats):
            self.snapshot = message.snapshot
        elif isinstance(message, Asset):
            waiting = self._assets.get(message.digest)
            if waiting is not None and not waiting.done():
                waiting.set_result(message.data)
        elif not isinstance(message, Pulse | KvDelta):
            log.warning("instance %s sent an unexpected %s", self.name, type(message).__name__)

    async def _write(self) -> None:
        try:
            while self.alive:
                await self._wake.wait()
                self._wake.clear()
                for message in self._take_outbox():
                    await self._stream.send(message)
        except (ConnectionError, WireError):
            log.warning("instance %s: cannot send", self.name)
            self._lose()

    def _take_outbox(self) -> list[FrontMessage]:
        outbox, self._outbox = self._outbox, []
        if self._commits:
            counts = tuple((rid, choice, count) for (rid, choice), count in self._commits.items())
            self._commits.clear()
            outbox.append(Committed(counts=counts))
        return outbox


def _ignore_frame(instance: Instance, frame: Frame) -> None:
    """Until `start`."""


def _ignore_lost(instance: Instance) -> None:
    """Until `start` and after `close`."""
