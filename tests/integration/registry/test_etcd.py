"""The etcd registry passes the conformance suite against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aetcd import rpc

from tests.faultlab.etcd import EtcdServer
from tests.null.service.registry.conformance import *  # noqa: F403
from tests.null.service.registry.conformance import Store
from xllm.service.registry.address import Address
from xllm.service.registry.etcd import EtcdRegistry


@pytest.fixture
async def store(etcd_server: EtcdServer) -> AsyncIterator[Store]:
    endpoint = Address("127.0.0.1", etcd_server.port)
    registry, other = EtcdRegistry([endpoint]), EtcdRegistry([endpoint])
    operator = rpc.insecure_channel(str(endpoint))
    kv = rpc.KVStub(operator)

    async def compact(revision: int) -> None:
        await kv.Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5.0)

    yield Store(registry=registry, other=other, compact=compact, pass_time=asyncio.sleep, min_ttl_s=1.0)
    await kv.DeleteRange(rpc.DeleteRangeRequest(key=b"/", range_end=b"0"), timeout=5.0)
    await operator.close()
    await registry.close()
    await other.close()
