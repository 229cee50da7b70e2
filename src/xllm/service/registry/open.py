"""Makes the registry that a setting names. `static://` has no registry behind it: see `directory`."""

from __future__ import annotations

from xllm.clock import Clock
from xllm.errors import ConfigError
from xllm.service.registry.address import RegistryAddress
from xllm.service.registry.base import Registry
from xllm.service.registry.embedded import EmbeddedRegistry
from xllm.service.registry.etcd import EtcdRegistry

MAX_CALL_S = 2.0


def open_registry(address: RegistryAddress, clock: Clock, *, ttl_s: float) -> Registry:
    """`ttl_s` is the shortest lease that will be kept: a call takes at most half of it.

    Raises ConfigError for what cannot work. Call it inside the event loop that will use it."""
    if address.kind == "etcd":
        return EtcdRegistry(address.endpoints, call_timeout_s=min(MAX_CALL_S, ttl_s / 2))
    if address.kind == "embedded":
        return EmbeddedRegistry(clock)
    raise ConfigError("registry=static://… holds fixed addresses; nothing can register there")
