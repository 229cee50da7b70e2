"""The bytes' way through mooncake's transfer engine, over TCP; control messages are our own.

A write blocks, so it runs on a thread of its own, one at a time. The addresses that a peer names are those of
its own registered pages; which of them are ours to write follows from leased slots.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from xllm.engine.kvtransfer.copying import runs
from xllm.engine.kvtransfer.memory import KVMemory
from xllm.engine.kvtransfer.outgoing import Part
from xllm.errors import ConfigError

PACKAGE = "mooncake-transfer-engine-non-cuda"

_ENDED: list[Any] = []
"""Engines are never destroyed: after one has been, other sockets of the process lose what they receive."""

Job = tuple[str, list[int], list[int], list[int], Callable[[bool], None]]


def why_not() -> str | None:
    """Why this installation cannot use mooncake; None = it can."""
    try:
        import mooncake.engine  # noqa: F401
    except ImportError as error:
        return f"{PACKAGE} cannot be imported ({error.name or 'a library it needs is missing'})"
    return None


class Mooncake:
    """One per engine. Registers all pages of `memory` once, at `host`."""

    def __init__(self, memory: KVMemory, host: str) -> None:
        """Raises ConfigError where it cannot be used."""
        reason = why_not()
        if reason is not None:
            raise ConfigError(
                f"transfer=mooncake: {reason}; install {PACKAGE} >= 0.3.13.post1 and libibverbs1",
                param="transfer",
            )
        from mooncake.engine import TransferEngine

        self._memory = memory
        self._engine: Any = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise ConfigError("transfer=mooncake: its transfer engine did not start", param="transfer")
        self.session = f"{host}:{self._engine.get_rpc_port()}"
        self.bases = tuple(int(g.pages.ctypes.data) for g in memory.groups)
        for base, group in zip(self.bases, memory.groups, strict=True):
            if self._engine.register_memory(base, group.pages.nbytes) != 0:
                raise ConfigError("transfer=mooncake: it refused the memory of KV pages", param="transfer")
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-mooncake", daemon=True)
        self._thread.start()

    def write(
        self,
        part: Part,
        slots: Sequence[int],
        session: str,
        bases: Sequence[int],
        done: Callable[[bool], None],
    ) -> None:
        """Copy a part to these slots of the peer; `done` is called on the writing thread."""
        page_bytes = self._memory.groups[part.group].page_bytes
        own, its = self.bases[part.group], bases[part.group]
        sources, targets, lengths = [], [], []
        whole = part.length == page_bytes
        for page, slot, count in runs(part.pages, slots):
            for i in range(1 if whole else count):
                sources.append(own + (page + i) * page_bytes + part.offset)
                targets.append(its + (slot + i) * page_bytes + part.offset)
                lengths.append(part.length * (count if whole else 1))
        self._jobs.put((session, sources, targets, lengths, done))

    def close(self) -> None:
        """Idempotent; a write that hangs is left to itself."""
        self._jobs.put(None)
        self._thread.join(1.0)
        for base in self.bases:
            if not self._thread.is_alive():
                self._engine.unregister_memory(base)
        if self.bases:
            _ENDED.append(self._engine)
        self.bases = ()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            session, sources, targets, lengths, done = job
            try:
                code = self._engine.batch_transfer_sync_write(session, sources, targets, lengths)
            except Exception:  # noqa: BLE001 (whatever its binding raises is a write that failed)
                code = -1
            done(code == 0)
