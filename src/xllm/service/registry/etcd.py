"""The registry on an etcd v3 server or cluster: keys, leases and watches in terms of its gRPC messages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from xllm.service.registry.address import Address
from xllm.service.registry.base import (
    MAX_VALUE_BYTES,
    Compare,
    Delete,
    Entry,
    Event,
    Get,
    Lease,
    LeaseGone,
    Listing,
    Operation,
    Outcome,
    Put,
    RegistryError,
    WatchLost,
    check_key,
    check_prefix,
    check_transaction,
    check_ttl,
)
from xllm.service.registry.etcd_link import CALL_TIMEOUT_S, Endpoint, EtcdLink, is_cancelled

PAGE_ENTRIES = 32
"""Entries of one answer to `list`: others may have written values of 1.5 MiB each (etcd's own limit)."""

MAX_LISTED = 10_000


class EtcdRegistry:
    """See `Registry`. Create it inside a running event loop; it connects by itself when first used."""

    def __init__(self, endpoints: Sequence[Address], *, call_timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._link = EtcdLink(endpoints, call_timeout_s)
        self._rpc = self._link.rpc

    # -- calls ------------------------------------------------------------------------------------

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        answer = await self._range(self._rpc.RangeRequest(key=key.encode()))
        return _entry(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str) -> Listing:
        check_prefix(prefix)
        begin, end = prefix.encode(), _after(prefix)
        entries: list[Entry] = []
        revision = 0
        while True:
            # All pages are read at the revision of the first one, so that together they are one view.
            request = self._rpc.RangeRequest(key=begin, range_end=end, limit=PAGE_ENTRIES, revision=revision)
            answer = await self._range(request)
            revision = revision or answer.header.revision
            entries.extend(_entry(kv) for kv in answer.kvs)
            if not answer.more:
                cluster = f"{answer.header.cluster_id:x}"
                return Listing(entries=tuple(entries), revision=revision, cluster=cluster)
            if len(entries) >= MAX_LISTED:
                raise RegistryError(f"more than {MAX_LISTED} keys below {prefix}; clean up the registry")
            begin = bytes(answer.kvs[-1].key) + b"\0"

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        outcome = await self.transact((), (Put(key=key, value=value, lease=lease),))
        return outcome.revision

    async def delete(self, key: str) -> bool:
        outcome = await self.transact((), (Get(key=key), Delete(key=key)))
        return outcome.entries[0] is not None

    async def transact(
        self, compares: Sequence[Compare], successes: Sequence[Operation], failures: Sequence[Operation] = ()
    ) -> Outcome:
        check_transaction(compares, successes, failures)
        request = self._rpc.TxnRequest(
            compare=[self._compare(compare) for compare in compares],
            success=[self._operation(op) for op in successes],
            failure=[self._operation(op) for op in failures],
        )
        # Not repeated: after an error nobody knows whether it took effect; the caller reads and decides.
        answer = await self._link.once(lambda at, s: at.kv.Txn(request, timeout=s, wait_for_ready=True))
        branch = successes if answer.succeeded else failures
        answers = zip(branch, answer.responses, strict=True)
        ranges = [reply.response_range for op, reply in answers if isinstance(op, Get)]
        entries = tuple(_entry(found.kvs[0]) if found.kvs else None for found in ranges)
        return Outcome(succeeded=answer.succeeded, revision=answer.header.revision, entries=entries)

    async def grant(self, ttl_s: float) -> Lease:
        check_ttl(ttl_s)
        request = self._rpc.LeaseGrantRequest(TTL=math.ceil(ttl_s))
        # Repeated at worst this leaves a lease without keys behind, which ends by itself.
        answer = await self._link.repeat(
            lambda at, s: at.lease.LeaseGrant(request, timeout=s, wait_for_ready=True)
        )
        return Lease(lease_id=answer.ID, ttl_s=float(answer.TTL))

    async def keep_alive(self, lease_id: int) -> bool:
        async def renew(at: Endpoint, timeout_s: float) -> Any:
            call = at.lease.LeaseKeepAlive(timeout=timeout_s, wait_for_ready=True)
            try:
                await call.write(self._rpc.LeaseKeepAliveRequest(ID=lease_id))
                answer = await call.read()
            finally:
                call.cancel()
            if answer is self._link.eof:
                raise RegistryError("the registry ended the call without an answer")
            return answer

        answer = await self._link.repeat(renew)
        return bool(answer.TTL > 0)

    async def revoke(self, lease_id: int) -> None:
        request = self._rpc.LeaseRevokeRequest(ID=lease_id)
        try:
            await self._link.once(lambda at, s: at.lease.LeaseRevoke(request, timeout=s, wait_for_ready=True))
        except LeaseGone:
            return

    async def close(self) -> None:
        await self._link.close()

    # -- watching -----------------------------------------------------------------------------------

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Event, None]:
        check_prefix(prefix)
        create = self._rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_after(prefix), start_revision=from_revision
        )
        at = self._link.endpoint()
        call = at.watch.Watch(wait_for_ready=True)
        try:
            async with asyncio.timeout(self._link.timeout_s):
                await call.write(self._rpc.WatchRequest(create_request=create))
                created = await call.read()
            self._check_created(created, from_revision)
            while True:
                answer = await call.read()
                if answer is self._link.eof:
                    raise WatchLost("disconnected")
                if answer.canceled or answer.compact_revision:
                    raise WatchLost("compacted" if answer.compact_revision else "disconnected")
                for event in answer.events:
                    yield _event(event)
        except TimeoutError as error:
            self._link.failed(at)
            raise WatchLost("disconnected") from error
        except self._rpc.AioRpcError as error:
            self._link.failed(at)
            raise WatchLost("disconnected") from error
        except asyncio.CancelledError:
            if self._link.closed and not is_cancelled():
                raise WatchLost("closed") from None
            raise
        finally:
            call.cancel()

    def _check_created(self, created: Any, from_revision: int) -> None:
        if created is None or not getattr(created, "created", False):
            raise WatchLost("disconnected")
        if created.compact_revision:
            raise WatchLost("compacted")
        if created.header.revision < from_revision - 1:
            # A store that has not got that far is another one, or an old copy: its events would never come.
            raise WatchLost("cluster")

    # -- plumbing -----------------------------------------------------------------------------------

    async def _range(self, request: Any) -> Any:
        return await self._link.repeat(lambda at, s: at.kv.Range(request, timeout=s, wait_for_ready=True))

    def _compare(self, compare: Compare) -> Any:
        message = self._rpc.Compare(key=compare.key.encode(), result=self._rpc.Compare.EQUAL)
        if compare.on == "create" or compare.revision == 0:
            message.target = self._rpc.Compare.CREATE
            message.create_revision = compare.revision
        else:
            message.target = self._rpc.Compare.MOD
            message.mod_revision = compare.revision
        return message

    def _operation(self, op: Operation) -> Any:
        rpc, key = self._rpc, op.key.encode()
        if isinstance(op, Put):
            return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=op.value, lease=op.lease))
        if isinstance(op, Delete):
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
        return rpc.RequestOp(request_range=rpc.RangeRequest(key=key))


def _entry(kv: Any) -> Entry:
    return Entry(
        key=kv.key.decode(errors="replace"),
        value=bytes(kv.value[: MAX_VALUE_BYTES + 1]),
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        lease=kv.lease,
    )


def _event(event: Any) -> Event:
    deleted = event.type == 1
    return Event(
        key=event.kv.key.decode(errors="replace"),
        revision=event.kv.mod_revision,
        entry=None if deleted else _entry(event.kv),
    )


def _after(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`, which ends with a slash."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])
