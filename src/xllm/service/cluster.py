"""One front over instances elsewhere: what `xllm service` stands on, as `local` is for `xllm serve`.

Composition only: the front, where it learns of instances, and its own entry in the registry.
"""

from __future__ import annotations

import os

from xllm.clock import Clock
from xllm.config import ClusterConfig, FrontConfig
from xllm.errors import ConfigError
from xllm.service.front import Front
from xllm.service.instances.remote import RemoteInstances, tcp_connector
from xllm.service.registry.address import is_id, parse_address, parse_registry
from xllm.service.registry.advertise import advertised
from xllm.service.registry.base import Registry
from xllm.service.registry.directory import Directory, RegistryDirectory, StaticDirectory
from xllm.service.registry.membership import Membership
from xllm.service.registry.open import open_registry
from xllm.service.registry.record import MemberRecord
from xllm.service.snapshot import FrontObserver
from xllm.wire.hello import FRONT, Identity
from xllm.wire.messages import WIRE_VERSION

SEVERAL_FRONTS = (
    "Roles are labels of one front, and several fronts may share this registry: start instances with the "
    "setting role, or run one front over static://."
)


class ClusterService:
    """Create it on the event loop, then `start`; end it with `close`. Instances come and go meanwhile."""

    def __init__(
        self,
        front_config: FrontConfig,
        config: ClusterConfig,
        clock: Clock,
        *,
        observer: FrontObserver | None = None,
    ) -> None:
        """Nothing is connected yet. Raises ConfigError for settings that cannot work."""
        address = parse_registry(config.registry)
        if address.kind == "embedded":
            raise ConfigError(
                "registry=embedded is for one process; xllm service needs etcd://host:port, or "
                "static://host:port with the addresses of instances"
            )
        if not is_id(config.cluster):
            raise ConfigError(f"cluster={config.cluster!r}: use letters, digits, '.', '_' and '-'")
        self._config = config
        self._endpoints = address.endpoints
        self._clock = clock
        self._identity = Identity.of(config, FRONT)
        self._registry: Registry | None = None
        self.directory: Directory
        if address.kind == "static":
            self.directory = StaticDirectory(address.endpoints)
        else:
            self._registry = open_registry(address, clock, ttl_s=config.lease_ttl_s)
            self.directory = RegistryDirectory(
                self._registry, config.cluster, "instances", relist_s=config.relist_s
            )
        self.front = Front(front_config, None, clock, observer=observer)
        if self._registry is not None:
            self.front.roles.why_not = lambda: SEVERAL_FRONTS
        self.remote = RemoteInstances(
            self.front,
            self.directory,
            tcp_connector(self._identity),
            clock,
            drain_s=front_config.shutdown_timeout_s,
        )
        self._membership: Membership | None = None

    def start(self) -> None:
        """Begin to look for instances."""
        self.remote.start()

    def register(self, address: str) -> None:
        """Tell the registry that a front answers HTTP at `address` (host:port); goes on by itself."""
        if self._registry is None:
            return
        bound = parse_address(address)
        identity = self._identity
        record = MemberRecord(
            # Drawn anew by each process: a front has no lasting name and never waits for an old lease.
            member_id=identity.incarnation,
            incarnation=identity.incarnation,
            address=advertised(self._config, (bound.host, bound.port), self._endpoints),
            wire_version=WIRE_VERSION,
            pid=os.getpid(),
            started_s=self._clock.wall_s(),
        )
        config = self._config
        self._membership = Membership(
            self._registry, config.cluster, "fronts", record, ttl_s=config.lease_ttl_s, clock=self._clock
        )
        self._membership.start()

    async def close(self, drain_s: float = 0.0) -> bool:
        """Let running requests end within `drain_s`, then let go of all; True if none was cut off."""
        if self._membership is not None:
            await self._membership.leave()
        complete = await self.front.drain(drain_s)
        await self.remote.close()
        await self.front.close()
        if self._registry is not None:
            await self._registry.close()
        return complete
