"""The global KV index: page digest → instances and tiers, fed by sequence-numbered deltas.

A picture for placement, never the truth: whoever reads a page compares its tokens, so a wrong entry
costs time and no correctness. Pure state; who asks for a re-sync and who purges is the front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xllm.errors import InternalError
from xllm.prefix import DIGEST_BYTES
from xllm.wire.messages import KvDelta

TIERS = ("device", "dram", "ssd", "remote")
"""Best first. A page that is in several tiers of an instance counts in the best one."""

_TIER_BITS = {tier: 1 << i for i, tier in enumerate(TIERS)}
_BITS = len(TIERS)
_SLOT_MASK = (1 << _BITS) - 1
_BEST_TIER = tuple(next((i for i in range(_BITS) if mask >> i & 1), 0) for mask in range(1 << _BITS))
_MAX_SHARED_MASKS = 4096


class _Holder:
    """One instance: its place in the masks, what it holds in any tier, and the next delta expected.

    `next_seq` None: no reset came yet, or a delta was lost; nothing is believed until the next reset.
    """

    __slots__ = ("held", "next_seq", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.held: set[bytes] = set()
        self.next_seq: int | None = None


class KvIndex:
    """See the module. Invariant (`check`): a page is in `_pages` with a slot's bits exactly if it is in
    that holder's `held`.

    Measured with a million pages: 140 bytes for a page and its first holder, 130 for each further one
    (its copy of the digest and a set entry); the masks are shared objects. `max_pages` bounds what one
    instance may claim.
    """

    def __init__(self, max_pages: int = 4_000_000) -> None:
        self._max_pages = max_pages
        self._pages: dict[bytes, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._names: list[str | None] = []
        self._masks: dict[int, int] = {}

    def __len__(self) -> int:
        """Distinct pages known anywhere."""
        return len(self._pages)

    def apply(self, instance: str, delta: KvDelta) -> bool:
        """Take in what `instance` says. False: a delta is missing, and nothing of this one was taken;
        ask for a reset once and go on calling: the answer is False until it arrives.

        After a gap what was known stays as a hint: it may send a request to a page that is gone, which
        costs what not knowing would have cost.
        """
        holder = self._holders.get(instance)
        if any(len(d) != DIGEST_BYTES for d in (*delta.stored, *delta.removed)):
            if holder is not None:
                holder.next_seq = None
            return False
        if delta.reset:
            self.purge(instance)
            holder = self._enter(instance)
        elif holder is None or holder.next_seq != delta.seq:
            if holder is not None:
                holder.next_seq = None
            return False
        holder.next_seq = delta.seq + 1
        bit = _TIER_BITS.get(delta.tier)
        # A tier of a newer peer: its pages cannot be weighed, so they are not known here.
        if bit is not None:
            shifted = bit << holder.slot * _BITS
            for digest in delta.removed:
                self._drop(holder, digest, shifted)
            for digest in delta.stored:
                self._store(holder, digest, shifted)
        return True

    def purge(self, instance: str) -> int:
        """Forget the instance (dead, or a new incarnation); how many pages it held. O(those pages)."""
        holder = self._holders.pop(instance, None)
        if holder is None:
            return 0
        every_tier = _SLOT_MASK << holder.slot * _BITS
        for digest in holder.held:
            self._clear(digest, every_tier)
        self._names[holder.slot] = None
        return len(holder.held)

    def match(self, chain: Sequence[bytes]) -> dict[str, tuple[tuple[str, int], ...]]:
        """Per instance that holds the first page: (tier, pages) of its leading run without a hole, best
        tier first. Each page of the run counts once, so the sum is the run's length."""
        found: dict[int, list[int]] = {}
        alive: list[int] = []
        mask, repeats = 0, 0
        for position, digest in enumerate(chain):
            here = self._pages.get(digest, 0)
            if here == mask and position:
                repeats += 1
                continue
            # Pages of a run mostly have the same holders; only a change is looked at slot by slot.
            _count(found, alive, mask, repeats)
            if position == 0:
                alive = list(_slots(here))
                found = {slot: [0] * _BITS for slot in alive}
            else:
                alive = [slot for slot in alive if here >> slot * _BITS & _SLOT_MASK]
            if not alive:
                repeats = 0
                break
            mask, repeats = here, 1
        _count(found, alive, mask, repeats)
        return {
            name: tuple((tier, num) for tier, num in zip(TIERS, counts, strict=True) if num)
            for slot, counts in found.items()
            if (name := self._names[slot]) is not None
        }

    def digests(self, instance: str, tier: str | None = None) -> frozenset[bytes]:
        """What the instance is known to hold, in one tier or in any. For views and tests: a copy."""
        holder = self._holders.get(instance)
        if holder is None:
            return frozenset()
        wanted = _SLOT_MASK if tier is None else _TIER_BITS[tier]
        shifted = wanted << holder.slot * _BITS
        return frozenset(d for d in holder.held if self._pages[d] & shifted)

    def instances(self) -> tuple[str, ...]:
        return tuple(sorted(self._holders))

    def num_pages(self, instance: str) -> int:
        holder = self._holders.get(instance)
        return 0 if holder is None else len(holder.held)

    def check(self) -> None:
        """Raise InternalError unless both directions agree. O(everything): for tests and idle times."""
        for name, holder in self._holders.items():
            if self._names[holder.slot] != name:
                raise InternalError("a slot of the KV index belongs to another instance")
        by_slot = {holder.slot: holder for holder in self._holders.values()}
        num_claims = 0
        for digest, mask in self._pages.items():
            slots = list(_slots(mask))
            if not slots:
                raise InternalError("the KV index lists a page that nobody holds")
            num_claims += len(slots)
            if any(slot not in by_slot or digest not in by_slot[slot].held for slot in slots):
                raise InternalError("the KV index names a holder that does not list the page")
        if num_claims != sum(len(holder.held) for holder in self._holders.values()):
            raise InternalError("a holder in the KV index lists a page that does not name it")

    def _enter(self, instance: str) -> _Holder:
        slot = self._names.index(None) if None in self._names else len(self._names)
        if slot == len(self._names):
            self._names.append(instance)
        else:
            self._names[slot] = instance
        holder = self._holders[instance] = _Holder(slot)
        return holder

    def _store(self, holder: _Holder, digest: bytes, bit: int) -> None:
        if len(holder.held) >= self._max_pages and digest not in holder.held:
            return
        mask = self._pages.get(digest, 0) | bit
        if len(self._masks) >= _MAX_SHARED_MASKS:
            self._masks.clear()
        self._pages[digest] = self._masks.setdefault(mask, mask)
        holder.held.add(digest)

    def _drop(self, holder: _Holder, digest: bytes, bit: int) -> None:
        if digest in holder.held:
            mask = self._clear(digest, bit)
            if not mask >> holder.slot * _BITS & _SLOT_MASK:
                holder.held.discard(digest)

    def _clear(self, digest: bytes, bits: int) -> int:
        mask = self._pages[digest] & ~bits
        if mask:
            self._pages[digest] = self._masks.setdefault(mask, mask)
        else:
            del self._pages[digest]
        return mask


def _slots(mask: int) -> Iterator[int]:
    slot = 0
    while mask:
        if mask & _SLOT_MASK:
            yield slot
        mask >>= _BITS
        slot += 1


def _count(found: dict[int, list[int]], alive: list[int], mask: int, repeats: int) -> None:
    if repeats:
        for slot in alive:
            found[slot][_BEST_TIER[mask >> slot * _BITS & _SLOT_MASK]] += repeats
