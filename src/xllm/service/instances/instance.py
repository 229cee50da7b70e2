"""An engine as the front sees it: one connection to one incarnation of it.

Owns the connection's two tasks. Sending never blocks the caller: the outbox is bounded by the
requests that the router lets onto the instance (one Submit, one Abort, one commit count per
choice each). Decides nothing: what arrives and the loss of the peer are handed to the front.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from xllm.errors import UnavailableError
from xllm.observability.profile import ProcessProfile
from xllm.service.instances.about import InstanceAbout, InstanceState
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
    Moved,
    Profiled,
    Pulse,
    Stats,
    StopProfile,
)
from xllm.wire.stream import EngineStream

log = logging.getLogger(__name__)

CauseOf = Callable[[], str | Awaitable[str]]
"""Asked when the instance is suspected or lost: a `failover.blame.DeathCause`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceHooks:
    """How an instance reaches the front; all run on its loop, `lost` at most once, and none after it.

    `progress`: output of the step thread has come. `heard`: another sign of life.
    """

    frame: Callable[[Instance, Frame], None]
    lost: Callable[[Instance], None]
    progress: Callable[[Instance], None]
    heard: Callable[[Instance], None]
    pulse: Callable[[Instance, Pulse], None]
    kv: Callable[[Instance, KvDelta], None]
    moved: Callable[[Instance, Moved], None]


class Instance:
    """`alive` goes from True to False once. The front alone writes the flags, the sets and the counts."""

    def __init__(
        self,
        stream: EngineStream,
        card: ModelCard,
        *,
        name: str,
        max_reqs: int | None = None,
        about: InstanceAbout | None = None,
        cause_of: CauseOf | None = None,
        on_hung: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.card = card
        self.max_reqs = max_reqs
        self.about = about if about is not None else InstanceAbout()
        self.cause_of = cause_of
        self.on_hung = on_hung
        self.alive = True
        self.started = False
        self.suspect = False
        self.draining = False
        self.drain_due_s: float | None = None
        self.kv_asked = False
        self.snapshot = EngineSnapshot(total_pages=card.num_pages, free_pages=card.num_pages)
        self.requests: set[str] = set()
        self.kept: set[str] = set()
        """Requests that are elsewhere by now, whose pages are still to be fetched from here."""
        self.inbound: dict[str, int] = {}
        """Requests that are being moved here, with their tokens: load that is certain to come."""
        self.ended_receiving = False
        """It was lost while peers brought it pages, or held pages that one of them might still write."""
        self.idle = asyncio.Event()
        self.idle.set()
        self.backlog_tokens = 0
        self.context_tokens = 0
        self._stream = stream
        self._outbox: list[FrontMessage] = []
        self._commits: dict[tuple[str, int], int] = {}
        self._assets: dict[str, asyncio.Future[bytes | None]] = {}
        self._profile: asyncio.Future[ProcessProfile | None] | None = None
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._hooks: InstanceHooks | None = None

    @property
    def state(self) -> InstanceState:
        if not self.alive:
            return "lost"
        if self.suspect:
            return "suspect"
        if self.draining:
            return "draining"
        return "ready" if self.started else "starting"

    @property
    def routable(self) -> bool:
        return self.alive and self.started and not self.suspect and not self.draining

    def start(self, hooks: InstanceHooks) -> None:
        """Begin reading and writing."""
        self._hooks = hooks
        self._tasks = [
            asyncio.create_task(self._read(), name=f"read {self.name}"),
            asyncio.create_task(self._write(), name=f"write {self.name}"),
        ]

    def enter(self, request_id: str) -> None:
        self.requests.add(request_id)
        self.idle.clear()

    def leave(self, request_id: str, num_choices: int) -> None:
        """The request is not here any more; its unsent commits are dropped."""
        self.requests.discard(request_id)
        for choice in range(num_choices):
            self._commits.pop((request_id, choice), None)
        self._note_idle()

    def keep(self, request_id: str) -> None:
        """It is elsewhere now, but this one has pages of it that must not go yet."""
        self.kept.add(request_id)
        self.idle.clear()

    def let_go(self, request_id: str) -> None:
        self.kept.discard(request_id)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self.requests and not self.kept:
            self.idle.set()

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

    async def fetch(self, digest: str) -> bytes:
        """The asset's bytes. UnavailableError when the engine lacks it or is lost meanwhile."""
        if digest not in self._assets:
            self._assets[digest] = asyncio.get_running_loop().create_future()
            self.post(AssetRequest(digest=digest))
        data = await asyncio.shield(self._assets[digest]) if self.alive else None
        if data is None:
            raise UnavailableError("the engine does not have a text asset of its model")
        return data

    async def profile(self, timeout_s: float) -> ProcessProfile | None:
        """What the engine recorded since it was asked to; None if it does not answer, as an older one."""
        if self._profile is None or self._profile.done():
            self._profile = asyncio.get_running_loop().create_future()
            self.post(StopProfile())
        if not self.alive:
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(self._profile), timeout_s)
        except TimeoutError:
            return None

    def abandon(self) -> None:
        """Treat it as lost from now on, whatever the peer may still send."""
        self._lose()

    async def close(self) -> None:
        """End the connection; the instance counts as lost afterwards, without a callback."""
        self._hooks = None
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
        self.ended_receiving = bool(self.inbound) or self.snapshot.transfer_pages > 0
        self._outbox.clear()
        self._commits.clear()
        for waiting in self._assets.values():
            if not waiting.done():
                waiting.set_result(None)
        if self._profile is not None and not self._profile.done():
            self._profile.set_result(None)
        self._wake.set()
        if self._hooks is not None:
            self._hooks.lost(self)

    async def _read(self) -> None:
        try:
            while self.alive and (message := await self._stream.receive()) is not None:
                self._dispatch(message)
        except WireError:
            log.exception("instance %s broke the wire protocol; closing it", self.name)
        except ConnectionError:
            log.warning("instance %s: connection lost", self.name)
        except Exception:
            # A bug of ours: without a reader the requests would hang, so they go elsewhere instead.
            log.exception("instance %s: reading failed; closing it", self.name)
        finally:
            self._lose()

    def _dispatch(self, message: EngineMessage) -> None:
        hooks = self._hooks
        if hooks is None or not self.alive:
            return  # a zombie's late words
        if isinstance(message, Frames):
            self.snapshot = message.snapshot
            hooks.progress(self)
            for frame in message.frames:
                hooks.frame(self, frame)
        elif isinstance(message, Pulse):
            hooks.pulse(self, message)
        elif isinstance(message, KvDelta):
            hooks.progress(self)
            hooks.kv(self, message)
        elif isinstance(message, Moved):
            hooks.progress(self)
            hooks.moved(self, message)
        elif isinstance(message, Stats):
            self.snapshot = message.snapshot
            hooks.heard(self)
        elif isinstance(message, Asset):
            hooks.heard(self)
            waiting = self._assets.get(message.digest)
            if waiting is not None and not waiting.done():
                waiting.set_result(message.data)
        elif isinstance(message, Profiled):
            hooks.heard(self)
            if self._profile is not None and not self._profile.done():
                self._profile.set_result(message.profile)
        else:
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
