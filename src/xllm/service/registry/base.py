"""What the service asks of a registry: keys with leases, transactions, watches. Values and one protocol.

Every implementation passes one conformance suite. Nothing here knows what is stored; nothing per
request is ever stored. A registry that cannot be reached costs no request: callers keep what they know.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from xllm.errors import RequestError, UnavailableError

MAX_VALUE_BYTES = 4096
MAX_KEY_CHARS = 512
MAX_OPERATIONS = 32
MIN_TTL_S, MAX_TTL_S = 1.0, 3600.0

_KEY = re.compile(r"(/[A-Za-z0-9._-]{1,128}){1,16}")
_PREFIX = re.compile(r"(/[A-Za-z0-9._-]{1,128}){0,16}/")


class RegistryError(UnavailableError):
    """The registry did not answer in time. Whether a write took effect is unknown then: read again."""

    default_code = "registry_unavailable"


class LeaseGone(UnavailableError):
    """The lease has expired or was revoked; its keys are deleted. Grant a new one."""

    default_code = "lease_gone"


WatchLostReason = Literal["compacted", "disconnected", "disorder", "cluster", "closed"]


class WatchLost(UnavailableError):
    """Events may have been missed: list again, then watch from the listing's revision on."""

    default_code = "watch_lost"

    def __init__(self, reason: WatchLostReason) -> None:
        super().__init__(f"the watch on the registry was lost ({reason}); list again")
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A key as it is stored. `lease` 0 = bound to none. `mod_revision` is what fences its next update.

    A value beyond MAX_VALUE_BYTES, written by somebody else, is cut to one byte more than that.
    """

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All entries below a prefix at one revision, sorted by key.

    `cluster` names the store itself: when it changes, revisions of the old one mean nothing.
    """

    entries: tuple[Entry, ...]
    revision: int
    cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`entry` None = the key was deleted at `revision`, by a client or by the end of its lease."""

    key: str
    revision: int
    entry: Entry | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """`ttl_s` is what was granted; it may be more than was asked for."""

    lease_id: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Holds when the key's revision of that kind is exactly this; 0 = there is no such key."""

    key: str
    revision: int
    on: Literal["create", "mod"] = "mod"


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Get:
    key: str


Operation = Put | Delete | Get


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`entries` answers the branch's `Get`s in order. `revision` is the store's after the transaction."""

    succeeded: bool
    revision: int
    entries: tuple[Entry | None, ...] = ()


class Registry(Protocol):
    """Every call ends within the implementation's deadline, with RegistryError if need be.

    Raises RequestError for keys and values out of bounds, before anything is sent.
    """

    async def get(self, key: str) -> Entry | None:
        """The entry now (linearizable), or None."""

    async def list(self, prefix: str) -> Listing:
        """Everything below `prefix`, which ends with a slash, so that a/1 is no prefix of a/10."""

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Store; the new mod revision. Raises LeaseGone."""

    async def delete(self, key: str) -> bool:
        """Whether there was such a key."""

    async def transact(
        self, compares: Sequence[Compare], successes: Sequence[Operation], failures: Sequence[Operation] = ()
    ) -> Outcome:
        """All compares hold → the successes, else the failures, in one step. Raises LeaseGone."""

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Event, None]:
        """Every change at `from_revision` or later, in order, without gaps; else it ends with WatchLost."""

    async def grant(self, ttl_s: float) -> Lease:
        """A lease that ends its keys when it was not kept alive for `ttl_s`."""

    async def keep_alive(self, lease_id: int) -> bool:
        """Renew; False = the lease is gone and so are its keys."""

    async def revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys; an unknown one is fine."""

    async def close(self) -> None:
        """Release the connection; watches end with WatchLost. Leases are left to expire."""


def check_key(key: str) -> None:
    if len(key) > MAX_KEY_CHARS or _KEY.fullmatch(key) is None:
        raise RequestError("a registry key is /word/word… of letters, digits, '.', '_', '-'", param="key")


def check_prefix(prefix: str) -> None:
    if len(prefix) > MAX_KEY_CHARS or _PREFIX.fullmatch(prefix) is None:
        raise RequestError("a registry prefix is a key that ends with a slash", param="prefix")


def check_value(value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise RequestError(f"a registry value has at most {MAX_VALUE_BYTES} bytes", param="value")


def check_ttl(ttl_s: float) -> None:
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise RequestError(f"a lease lasts {MIN_TTL_S:g} to {MAX_TTL_S:g} seconds", param="ttl_s")


def check_transaction(
    compares: Sequence[Compare], successes: Sequence[Operation], failures: Sequence[Operation]
) -> None:
    """Bounds of a transaction; no key may be written twice in one branch (no order would be defined)."""
    if max(len(compares), len(successes), len(failures)) > MAX_OPERATIONS:
        raise RequestError(f"a transaction has at most {MAX_OPERATIONS} parts", param="operations")
    for compare in compares:
        check_key(compare.key)
    for branch in (successes, failures):
        written = [op.key for op in branch if not isinstance(op, Get)]
        if len(written) != len(set(written)):
            raise RequestError("a transaction writes a key once", param="operations")
        for op in branch:
            check_key(op.key)
            if isinstance(op, Put):
                check_value(op.value)
