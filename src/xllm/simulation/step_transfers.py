"""What a simulated step thread speaks to: pages that a step writes move while it lasts, layer by layer.

A simulated step computes at one instant and then lasts; without this its pages would be on their way before
they exist. Nothing is copied here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from xllm.engine.kvtransfer.base import Manifest, Pushed, Slots, Transfers
from xllm.errors import ErrorInfo
from xllm.simulation.transfers import Spawn


class StepTransfers:
    """A `Transfers` in front of another one. `step_takes` follows the pushes of a step and begins its time.

    Each KV group counts as a layer: it may be read once its share of the step's time has passed.
    """

    def __init__(
        self, transfers: Transfers, *, may_run: Callable[[], Awaitable[object]], spawn: Spawn
    ) -> None:
        self._transfers = transfers
        self._may_run = may_run
        self._spawn = spawn
        self._step = 0
        self._num_done = 0
        self._written: list[tuple[str, Pushed]] = []

    def step_takes(self, seconds: float) -> None:
        if self._written:
            self._spawn(self._by_layers(self._step, seconds), "layers")

    # -- the protocol -------------------------------------------------------------------------------

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self._transfers.endpoints

    def send(self, transfer_id: str, endpoints: tuple[str, ...], num_pages: tuple[int, ...]) -> None:
        self._transfers.send(transfer_id, endpoints, num_pages)

    def push(self, transfer_id: str, pushed: Pushed) -> None:
        if pushed.after_layer:
            self._written.append((transfer_id, pushed))
        else:
            self._transfers.push(transfer_id, pushed)

    def step_done(self) -> None:
        self._push_layers(len(self._written[0][1].pages) if self._written else 0)
        self._written = []
        self._num_done = 0
        self._step += 1

    def num_pending(self, transfer_id: str) -> int | None:
        return self._transfers.num_pending(transfer_id)

    def finish(self, transfer_id: str, manifest: Manifest) -> None:
        self._transfers.finish(transfer_id, manifest)

    def accept(self, transfer_id: str, slots: Slots) -> None:
        self._transfers.accept(transfer_id, slots)

    def refuse(self, transfer_id: str, error: ErrorInfo) -> None:
        self._transfers.refuse(transfer_id, error)

    def pull(
        self,
        transfer_id: str,
        endpoints: tuple[str, ...],
        *,
        root: bytes = b"",
        digests: tuple[bytes, ...] = (),
    ) -> None:
        self._transfers.pull(transfer_id, endpoints, root=root, digests=digests)

    def give(self, transfer_id: str, pushed: Pushed, manifest: Manifest) -> None:
        self._transfers.give(transfer_id, pushed, manifest)

    def cancel(self, transfer_id: str) -> None:
        self._transfers.cancel(transfer_id)

    def close(self) -> None:
        self._transfers.close()

    # -- inside -----------------------------------------------------------------------------------

    async def _by_layers(self, step: int, seconds: float) -> None:
        num_groups = len(self._written[0][1].pages)
        for num_done in range(1, num_groups + 1):
            await asyncio.sleep(seconds / (num_groups + 1))
            await self._may_run()
            if self._step != step:
                return  # it was stopped meanwhile, and the end of the step came first
            self._push_layers(num_done)

    def _push_layers(self, num_done: int) -> None:
        """Push what lies in the first groups and has not been pushed yet."""
        for transfer_id, pushed in self._written:
            indices = self._range(pushed.indices, num_done)
            pages = self._range(pushed.pages, num_done)
            self._transfers.push(transfer_id, Pushed(indices=indices, pages=pages))
        self._num_done = num_done

    def _range(self, slots: Slots, num_done: int) -> Slots:
        return tuple(group if self._num_done <= g < num_done else () for g, group in enumerate(slots))
