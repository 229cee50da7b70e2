"""Calls to an etcd server or cluster over the gRPC stubs that aetcd brings: deadlines, retries, one error.

aetcd's own client is not used: it hides revisions of transactions, knows one endpoint, and its watch
loses the border between "nothing happened" and "not connected". Nothing here knows keys or leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from xllm.errors import ConfigError
from xllm.service.registry.address import Address
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.base import LeaseGone, RegistryError

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
MIN_TRY_S = 0.3
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    # Notices a peer that vanished without a word. etcd refuses pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
)


class Endpoint:
    """One server's stubs; gRPC connects and reconnects when they are used."""

    def __init__(self, rpc: Any, address: Address) -> None:
        self.address = address
        self._channel = rpc.insecure_channel(str(address), options=_OPTIONS)
        self.kv = rpc.KVStub(self._channel)
        self.lease = rpc.LeaseStub(self._channel)
        self.watch = rpc.WatchStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()


Call = Callable[[Endpoint, float], Awaitable[Any]]
"""(where, seconds it may take) → the answer."""


class EtcdLink:
    """All endpoints of one cluster, one of them in use until it fails. Create it inside the event loop."""

    def __init__(self, addresses: Sequence[Address], timeout_s: float = CALL_TIMEOUT_S) -> None:
        try:
            from aetcd import rpc
            from grpc.aio import EOF
        except ImportError as error:
            raise ConfigError(
                "registry=etcd://… needs the package aetcd; install xllm[etcd]", code="missing_package"
            ) from error
        self.rpc: Any = rpc
        self.eof: Any = EOF
        self.timeout_s = timeout_s
        self.closed = False
        self._endpoints = [Endpoint(rpc, address) for address in addresses]
        self._current = 0

    def endpoint(self) -> Endpoint:
        if self.closed:
            raise RegistryError("the registry is closed")
        return self._endpoints[self._current]

    def failed(self, endpoint: Endpoint) -> None:
        """Use the next one from now on, if nobody has turned to it already."""
        if self._endpoints[self._current] is endpoint:
            self._current = (self._current + 1) % len(self._endpoints)

    async def repeat(self, call: Call) -> Any:
        """For calls that may be made twice: one endpoint after the other until the time is over."""
        backoff = Backoff(0.05, 0.5)
        now = asyncio.get_running_loop().time
        end_s = now() + self.timeout_s
        try_s = max(MIN_TRY_S, self.timeout_s / len(self._endpoints))
        while True:
            try:
                return await self.once(call, min(try_s, max(MIN_TRY_S, end_s - now())))
            except RegistryError:
                pause_s = backoff.delay_s()
                if self.closed or now() + pause_s >= end_s:
                    raise
                await asyncio.sleep(pause_s)

    async def once(self, call: Call, timeout_s: float | None = None) -> Any:
        """For calls whose effect is unknown after an error: the caller reads and decides.

        Raises LeaseGone, or RegistryError for everything else that can go wrong.
        """
        at = self.endpoint()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            # gRPC has the deadline; ours is for the case that it does not keep it.
            async with asyncio.timeout(timeout_s + 1.0):
                return await call(at, timeout_s)
        except self.rpc.AioRpcError as error:
            if "lease not found" in (error.details() or ""):
                raise LeaseGone("the lease of this call is gone") from error
            self.failed(at)
            log.debug("etcd at %s: %s %s", at.address, error.code(), error.details())
            raise RegistryError(f"the registry does not answer ({error.code().name.lower()})") from error
        except TimeoutError as error:
            self.failed(at)
            raise RegistryError("the registry does not answer (timeout)") from error
        except asyncio.CancelledError:
            # Closing a channel cancels its calls; a cancelled task of ours is another matter.
            if self.closed and not is_cancelled():
                raise RegistryError("the registry is closed") from None
            raise

    async def close(self) -> None:
        self.closed = True
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))


def is_cancelled() -> bool:
    """Whether somebody asked this very task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
