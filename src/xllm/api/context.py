"""What every endpoint works with: the front, the clock, and a place for long text work.

No HTTP and no formats; one value per app.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from xllm.api.fields import Fields
from xllm.api.http import Request
from xllm.clock import Clock
from xllm.errors import NotFoundError, RequestError
from xllm.observability.profile import ProcessProfile
from xllm.observability.tracing import open_request
from xllm.service.draft import RequestDraft
from xllm.service.roles.board import Standing
from xllm.service.snapshot import FrontSnapshot
from xllm.service.stream import RequestStream
from xllm.service.watch.desk import WatchDesk
from xllm.text import TextAssets
from xllm.types import ModelCard

T = TypeVar("T")

LONG_TEXT_BYTES = 16 * 1024
"""A body beyond this is tokenised in a thread, so that other streams go on meanwhile."""


class FrontPort(Protocol):
    """The part of `service.front.Front` that HTTP needs."""

    async def submit(self, draft: RequestDraft) -> RequestStream: ...

    def check(self, draft: RequestDraft) -> None: ...

    def models(self) -> list[ModelCard]: ...

    def text(self, model: str) -> TextAssets: ...

    def ready(self) -> tuple[bool, str]: ...

    def snapshot(self) -> FrontSnapshot: ...

    def start_profiles(self, max_events: int, max_s: float) -> None: ...

    async def stop_profiles(self, timeout_s: float) -> dict[str, ProcessProfile | None]: ...

    def set_role(self, name: str, role: str, epoch: int | None, *, pinned: bool) -> Standing: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model under the name the client used."""

    name: str
    card: ModelCard
    text: TextAssets

    @property
    def fingerprint(self) -> str:
        """Equal for equal numerics: then the same seed gives the same tokens."""
        return "fp_" + hashlib.sha256(self.card.numerics_class.encode()).hexdigest()[:12]


class Context:
    def __init__(self, front: FrontPort, clock: Clock, desk: WatchDesk) -> None:
        self.front = front
        self.desk = desk
        self._clock = clock
        # Two, so that one huge prompt cannot hold up every other one.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="xllm-text")

    def model(self, fields: Fields) -> Model:
        """The model the body names; a body without a name means the only one there is.

        Raises NotFoundError(model_not_found), RequestError(missing_required_parameter).
        """
        name = fields.string("model")
        cards = self.front.models()
        if name is None and len(cards) == 1:
            name = cards[0].model_id
        if name is None:
            raise RequestError("'model' is required.", code="missing_required_parameter", param="model")
        return Model(name=name, card=self.card(name), text=self.front.text(name))

    def card(self, name: str) -> ModelCard:
        for card in self.front.models():
            if name == card.model_id or name in card.aliases:
                return card
        raise NotFoundError(
            "The model does not exist; see /v1/models.", code="model_not_found", param="model"
        )

    def stamped(self, draft: RequestDraft, request: Request) -> RequestDraft:
        """The draft with what its HTTP request tells: its name, whose it is, when it came, its trace."""
        headers = request.head.values(b"traceparent")
        header = headers[0].decode("latin-1") if len(headers) == 1 else None
        trace, parent = open_request(self.desk.tracer, header)
        return replace(
            draft,
            tenant=request.caller.key_id,
            client_id=request.request_id,
            received_s=request.received_s,
            trace=trace,
            trace_parent=parent,
        )

    def monotonic_s(self) -> float:
        """The front's clock."""
        return self._clock.monotonic_s()

    def now_s(self) -> int:
        """Unix time for `created`."""
        return int(self._clock.wall_s())

    async def run_text(self, size_bytes: int, work: Callable[[], T]) -> T:
        """`work` on text of about this size: here when short, in a thread when long."""
        if size_bytes <= LONG_TEXT_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
