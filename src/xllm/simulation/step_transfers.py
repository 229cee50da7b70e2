"""What a simulated step thread speaks to: its words reach the transfers when the step's time has passed.

A simulated step computes at one instant and then lasts; without this a transfer would begin before the pages
exist. Nothing is copied here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from xllm.engine.kvtransfer.base import Manifest, Pushed, Slots, Transfers
from xllm.errors import ErrorInfo
from xllm.simulation.transfers import Spawn


class StepTransfers:
    """A `Transfers` in front of another one. The engine says `step_begins`, `step_takes`, `step_ends`.

    Between the first and the last everything waits, except pages that the step writes: each KV group counts
    as a layer, and may be read once its share of the time has passed.
    """

    def __init__(
        self, transfers: Transfers, *, may_run: Callable[[], Awaitable[object]], spawn: Spawn
    ) -> None:
        self._transfers = transfers
        self._may_run = may_run
        self._spawn = spawn
        self._in_step = False
        self._step = 0
        self._num_done = 0
        self._later: list[Callable[[], None]] = []
        self._written: list[tuple[str, Pushed]] = []

    def step_begins(self) -> None:
        self._in_step = True
        self._num_done = 0

    def step_takes(self, seconds: float) -> None:
        if self._written:
            self._spawn(self._by_layers(self._step, seconds), "layers")

    def step_ends(self) -> None:
        self._in_step = False
        self._step += 1
        self._push_layers(len(self._written[0][1].pages) if self._written else 0)
        self._written = []
        later, self._later = self._later, []
        for call in later:
            call()

    # -- the protocol -------------------------------------------------------------------------------

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self._transfers.endpoints

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        self._in_time(lambda: self._transfers.send(transfer_id, endpoints, num_pages))

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        if pushed.after_layer:
            self._written.append((transfer_id, pushed))
        else:
            self._in_time(lambda: self._transfers.push(transfer_id, pushed))

    def step_done(self) -> None:
        """Said within the step, whose end says it again."""

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        self._in_time(lambda: self._transfers.finish(transfer_id, manifest))

    def accept(self, transfer_id: str, slots: Slots) -> None:
        self._in_time(lambda: self._transfers.accept(transfer_id, slots))

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        self._in_time(lambda: self._transfers.refuse(transfer_id, error))

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        self._in_time(lambda: self._transfers.pull(transfer_id, endpoints, root=root, digests=digests))

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        self._in_time(lambda: self._transfers.give(transfer_id, pushed, manifest))

    def cancel(self, transfer_id: str) -> None:
        self._in_time(lambda: self._transfers.cancel(transfer_id))

    def close(self) -> None:
        self._transfers.close()

    # -- inside -----------------------------------------------------------------------------------

    def _in_time(self, call: Callable[[], None]) -> None:
        if self._in_step:
            self._later.append(call)
        else:
            call()

    async def _by_layers(self, step: int, seconds: float) -> None:
        num_groups = len(self._written[0][1].pages)
        for num_done in range(1, num_groups + 1):
            await asyncio.sleep(seconds / (num_groups + 1))
            await self._may_run()
            if self._step != step:
                return
            self._push_layers(num_done)

    def _push_layers(self, num_done: int) -> None:
        """Push what lies in the first groups and has not been pushed yet."""
        for transfer_id, pushed in self._written:
            indices = tuple(self._range(pushed.indices, num_done))
            pages = tuple(self._range(pushed.pages, num_done))
            self._transfers.push(transfer_id, Pushed(indices=indices, pages=pages))
        self._num_done = num_done

    def _range(self, slots: Slots, num_done: int) -> list[tuple[int, ...]]:
        return [group if self._num_done <= g < num_done else () for g, group in enumerate(slots)]
