"""A process's own place in the registry: registered, kept alive, registered again, drained, left.

Serving never depends on it: a member without a lease goes on with the connections it has. Only
a live stranger under the same name at the start is fatal, since two cannot be told apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from xllm.clock import Clock
from xllm.errors import ConfigError, RequestError, UnavailableError
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.base import Entry, Registry, check_key, check_ttl
from xllm.service.registry.held_key import HeldKey
from xllm.service.registry.record import (
    MemberKind,
    MemberRecord,
    MemberState,
    decode_record,
    encode_record,
    member_key,
)

log = logging.getLogger(__name__)

RENEW_SHARE = 1 / 3
"""Of the lease's time between two renewals: two may fail before it ends."""


class Membership:
    """`start`, then `join` to wait for the place; `leave` once. `num_joins` counts lives in the registry."""

    def __init__(
        self,
        registry: Registry,
        cluster: str,
        kind: MemberKind,
        record: MemberRecord,
        *,
        ttl_s: float,
        clock: Clock,
        backoff: Backoff | None = None,
    ) -> None:
        """Raises ConfigError for a record that no reader would accept, or a lease that no registry grants."""
        key = member_key(cluster, kind, record.member_id)
        _check(key, record, ttl_s)
        self._key = HeldKey(registry, key, ttl_s=ttl_s, clock=clock)
        self._record = record
        self._clock = clock
        self._backoff = backoff if backoff is not None else Backoff()
        # One step at a time: the renewing task and `announce` write the same key.
        self._step = asyncio.Lock()
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._joined.add_done_callback(_seen)
        self._task: asyncio.Task[None] | None = None
        self._reachable = True
        self._claiming_since_s: float | None = None
        self.num_joins = 0

    @property
    def epoch(self) -> int:
        """Fencing token of the present registration; 0 = not registered."""
        return self._key.epoch

    @property
    def record(self) -> MemberRecord:
        return self._record

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"membership {self._key.key}")

    async def join(self) -> None:
        """Wait until registered for the first time, however long the registry takes to appear.

        Raises ConfigError when a live member has this name.
        """
        await asyncio.shield(self._joined)

    async def announce(self, state: MemberState) -> bool:
        """Tell the others at once if possible; else the next renewal does. Whether it is told."""
        self._record = msgspec.structs.replace(self._record, state=state)
        with contextlib.suppress(UnavailableError):
            async with self._step:
                return await self._key.update(encode_record(self._record))
        return False

    async def leave(self) -> None:
        """Stop renewing and give the lease back; a registry that is away lets it expire."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not self._joined.done():
            self._joined.cancel()
        try:
            await self._key.release()
        except UnavailableError:
            log.warning("left without telling the registry, which does not answer; the lease will expire")

    async def _run(self) -> None:
        while True:
            try:
                async with self._step:
                    pause_s = await self._claim_or_renew()
                self._say_reachable(True)
                self._backoff.reset()
            except ConfigError as error:
                if not self._joined.done():
                    self._joined.set_exception(error)
                    return
                # We were here first and lost the name while we were away. Our fronts' connections stay.
                log.error("%s", error.message)
                pause_s = self._key.ttl_s
            except UnavailableError as error:
                self._say_reachable(False, error.message)
                pause_s = min(self._backoff.delay_s(), self._key.ttl_s * RENEW_SHARE)
            except Exception:
                # A bug of ours must not end the registration of a process that serves.
                log.exception("%s: keeping the place in the registry failed; trying again", self._key.key)
                pause_s = self._key.ttl_s * RENEW_SHARE
            await asyncio.sleep(pause_s)

    async def _claim_or_renew(self) -> float:
        """One step; seconds until the next one. Raises ConfigError when the name is a live stranger's."""
        value = encode_record(self._record)
        if self._key.held and await self._key.renew(value):
            return self._key.ttl_s * RENEW_SHARE
        holder = await self._key.claim(value)
        if holder is not None:
            return self._wait_for(holder)
        self._claiming_since_s = None
        self.num_joins += 1
        log.info("registered as %s, epoch %d", self._key.key, self._key.epoch)
        if not self._joined.done():
            self._joined.set_result(None)
        return self._key.ttl_s * RENEW_SHARE

    def _wait_for(self, holder: Entry) -> float:
        """Our own former life holds the name until its lease ends; whoever holds it longer is alive."""
        now_s = self._clock.monotonic_s()
        if self._claiming_since_s is None:
            self._claiming_since_s = now_s
        # A lease of theirs may be as long as ours, and a registry ends leases late rather than early.
        if now_s - self._claiming_since_s <= 1.5 * self._key.ttl_s + 1.0:
            return self._key.ttl_s / 10
        self._claiming_since_s = None
        found = decode_record(holder.key, holder.value)
        where = f" at {found.address}, pid {found.pid}" if isinstance(found, MemberRecord) else ""
        raise ConfigError(
            f"the name {self._record.member_id!r} is taken by a live member{where}; "
            "end that one or choose another instance_id",
            code="instance_id_taken",
        )

    def _say_reachable(self, reachable: bool, why: str = "") -> None:
        """Once per outage, not once per try."""
        if reachable and not self._reachable:
            log.warning("the registry answers again")
        elif not reachable and self._reachable:
            log.warning("%s; serving goes on, registration is tried again", why)
        self._reachable = reachable


def _check(key: str, record: MemberRecord, ttl_s: float) -> None:
    try:
        check_key(key)
        check_ttl(ttl_s)
    except RequestError as error:
        raise ConfigError(f"cluster, instance_id, lease_ttl_s: {error.message}") from error
    found = decode_record(key, encode_record(record))
    if not isinstance(found, MemberRecord):
        raise ConfigError(
            f"this member cannot be registered ({found}); check address, served_model_name and instance_id"
        )


def _seen(joined: asyncio.Future[None]) -> None:
    """Nobody may have waited; the error was logged by who did, or ends with the process."""
    if not joined.cancelled():
        joined.exception()
