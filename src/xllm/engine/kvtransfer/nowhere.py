"""Transfers of an engine that exchanges no pages: every attempt fails at once, by name."""

from __future__ import annotations

from collections.abc import Callable

from xllm.engine.kvtransfer.base import Failed, Manifest, Pushed, Released, Slots, TransferEvent
from xllm.errors import ErrorInfo

NO_TRANSFER = ErrorInfo(
    kind="UnavailableError", code="no_transfer", message="this engine exchanges no pages (transfer=off)"
)


class NoTransfers:
    """`tell` takes the events; they may come before the call that causes them returns."""

    endpoints: tuple[str, ...] = ()

    def __init__(self, tell: Callable[[TransferEvent], None]) -> None:
        self._tell = tell

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        self._fail(transfer_id)

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        return

    def step_done(self) -> None:
        return

    def num_pending(self, transfer_id: str) -> int | None:
        return None

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        return

    def accept(self, transfer_id: str, slots: Slots) -> None:
        return

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        return

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        self._fail(transfer_id)

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        return

    def cancel(self, transfer_id: str) -> None:
        return

    def close(self) -> None:
        return

    def _fail(self, transfer_id: str) -> None:
        self._tell(Failed(transfer_id=transfer_id, error=NO_TRANSFER))
        self._tell(Released(transfer_id=transfer_id))
