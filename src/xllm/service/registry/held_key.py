"""One key held under one lease: claim, renew, update, give up. Members and leaders are made of this.

Single steps without a loop of their own; who calls them when is the caller's matter. Ownership is
decided by leases, never by what a value says: values are written by strangers, too.
"""

from __future__ import annotations

from xllm.clock import Clock
from xllm.service.registry.base import Compare, Delete, Entry, Get, Lease, Put, Registry

DEMOTE_AFTER = 2 / 3
"""Share of the lease after which a holder that could not renew stops acting as one, by its own clock."""


class HeldKey:
    """`epoch` fences what the holder does: the revision it won the key at; 0 = not held.

    A later holder always has a greater epoch. Updates compare the key's last revision, so a holder that
    slept through its lease cannot write over its successor.
    """

    def __init__(self, registry: Registry, key: str, *, ttl_s: float, clock: Clock) -> None:
        self.key = key
        self.epoch = 0
        self._registry = registry
        self._ttl_s = ttl_s
        self._clock = clock
        self._lease: Lease | None = None
        self._revision = 0
        self._renewed_s = 0.0

    @property
    def held(self) -> bool:
        """Whether the last step found the key ours. For exclusive action ask `may_act`."""
        return self.epoch > 0

    @property
    def ttl_s(self) -> float:
        """What the registry granted, or what will be asked for."""
        return self._lease.ttl_s if self._lease is not None else self._ttl_s

    def may_act(self) -> bool:
        """Whether the lease surely still runs. By the monotonic clock, so it needs no registry to say no.

        The time counts from before a renewal was sent: the registry's own count began later.
        """
        if not self.held or self._lease is None:
            return False
        return self._clock.monotonic_s() - self._renewed_s < DEMOTE_AFTER * self._lease.ttl_s

    async def claim(self, value: bytes) -> Entry | None:
        """Take the key if nobody holds it; None = it is ours, else the entry of who has it.

        Raises RegistryError, also with the outcome unknown; call it again then.
        """
        lease = await self._leased()
        put = Put(key=self.key, value=value, lease=lease.lease_id)
        created = await self._registry.transact(
            [Compare(key=self.key, revision=0, on="create")], [put], [Get(key=self.key)]
        )
        if created.succeeded:
            self.epoch = self._revision = created.revision
            return None
        found = created.entries[0]
        if found is None or found.lease not in (0, lease.lease_id):
            return found
        # Ours from an attempt whose answer was lost, or bound to no lease: nobody keeps it alive.
        swapped = await self._registry.transact(
            [Compare(key=self.key, revision=found.mod_revision)], [put], [Get(key=self.key)]
        )
        if swapped.succeeded:
            self.epoch = self._revision = swapped.revision
            return None
        return swapped.entries[0] or found

    async def renew(self, value: bytes) -> bool:
        """Keep the lease and see that the key still stands there with `value`; False = lost, claim again."""
        if self._lease is None or not self.held:
            return False
        started_s = self._clock.monotonic_s()
        if not await self._registry.keep_alive(self._lease.lease_id):
            self._lease, self.epoch = None, 0
            return False
        entry = await self._registry.get(self.key)
        if entry is None or entry.lease != self._lease.lease_id:
            # Deleted or overwritten behind our back; the lease is fine and serves the next claim.
            self.epoch = 0
            return False
        self._renewed_s = started_s
        self._revision = entry.mod_revision
        return entry.value == value or await self._write(value)

    async def update(self, value: bytes) -> bool:
        """Change the value; False = the key is not ours (any more)."""
        return self.held and await self._write(value)

    async def release(self) -> None:
        """Give the key up at once: by the lease, which is nobody else's."""
        lease, self._lease, self.epoch = self._lease, None, 0
        if lease is not None:
            await self._registry.revoke(lease.lease_id)

    async def _write(self, value: bytes) -> bool:
        if self._lease is None:
            return False
        put = Put(key=self.key, value=value, lease=self._lease.lease_id)
        outcome = await self._registry.transact([Compare(key=self.key, revision=self._revision)], [put])
        if outcome.succeeded:
            self._revision = outcome.revision
        else:
            self.epoch = 0
        return outcome.succeeded

    async def _leased(self) -> Lease:
        """The lease, renewed; a new one if it is gone. While an old one runs, no second one is made."""
        started_s = self._clock.monotonic_s()
        if self._lease is not None and not await self._registry.keep_alive(self._lease.lease_id):
            self._lease = None
        if self._lease is None:
            self._lease = await self._registry.grant(self._ttl_s)
        self._renewed_s = started_s
        return self._lease


async def delete_if_unchanged(registry: Registry, entry: Entry) -> bool:
    """Remove an entry that is exactly the one that was read."""
    compare = Compare(key=entry.key, revision=entry.mod_revision)
    return (await registry.transact([compare], [Delete(key=entry.key)])).succeeded
