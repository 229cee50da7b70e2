"""Memory in which a slot's engines, one after another, keep KV pages: held here, so that it outlives them.

The front never looks into it. What a page is, and whether it may be believed, is the engine's matter.
"""

from __future__ import annotations

import fcntl
import logging
import os

log = logging.getLogger(__name__)


class SlotPages:
    """An anonymous file of the slot, made when first asked for; None where the system has no such thing."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._fd: int | None = None

    @property
    def fd(self) -> int | None:
        """To be inherited by the slot's engine and nobody else; no message ever names it."""
        if self._fd is None:
            self._fd = _create(self._name)
        return self._fd

    def renew(self) -> None:
        """Forget what is in it: the next engine begins with fresh memory."""
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _create(name: str) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    try:
        fd = os.memfd_create(f"xllm-pages-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        log.warning("KV pages of %s will not survive it: %s", name, error)
        return None
    # Nobody may shrink it under an engine that has mapped it. The engine chooses the size, for it knows
    # the model; no seal against growing then.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd
