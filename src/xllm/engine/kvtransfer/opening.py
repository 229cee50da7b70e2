"""The data plane of a loaded engine, as its settings say. Who gets the events is the caller's matter."""

from __future__ import annotations

from collections.abc import Callable

from xllm.config.schema import TransferConfig
from xllm.engine.kvtransfer.base import TransferEvent
from xllm.engine.kvtransfer.memory import KVMemory, StepWatch, anonymous_pages
from xllm.engine.kvtransfer.plane import DataPlane
from xllm.engine.kvtransfer.sharing import PageKind
from xllm.engine.surviving import SharedPages
from xllm.types import ModelCard
from xllm.wire.hello import INSTANCE, Identity
from xllm.wire.proof import ClusterKey


def open_plane(
    config: TransferConfig,
    card: ModelCard,
    memory: KVMemory | None,
    identity: Identity,
    tell: Callable[[TransferEvent], None],
    watch: StepWatch | None = None,
    advertise: str | None = None,
) -> DataPlane | None:
    """Started; None where transfers are off or the host cannot touch the pages. Raises ConfigError."""
    if config.transfer == "off" or memory is None:
        return None
    kind = PageKind(
        numerics_class=card.numerics_class, layout_digest=card.kv_layout_digest, page_size=card.page_size
    )
    plane = DataPlane(
        memory,
        kind,
        identity,
        tell,
        watch=watch,
        ways=config.transfer,
        listen=config.transfer_listen,
        advertise=advertise,
    )
    plane.start()
    return plane


def pages_for_peers(config: TransferConfig) -> SharedPages | None:
    """Memory into which peers on this machine can write, for an engine that inherited none; None where it
    would be of no use."""
    return anonymous_pages() if config.transfer in ("auto", "shm") else None


def peer_identity(peer_key: bytes, peer_id: str = "") -> Identity:
    """Of an engine that a front started: it proves to its siblings what the front gave them all."""
    return Identity(role=INSTANCE, peer_id=peer_id, key=ClusterKey(peer_key))
