"""Equal parts for tenants that compete, everything for one that is alone. Pure and bounded.

When several want in, a tenant that holds more than its equal part is stopped a little earlier than the
others. The room so kept goes to those with less, so parts converge while requests end.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

EARLIER = 0.75
"""A tenant beyond its part sees limits times this while others want in."""
REMEMBERED_S = 10.0
"""Somebody who was refused is taken to want in for that long: the longest usual Retry-After."""
MAX_REFUSED = 1024


class Shares:
    """`hold` and `release` come in pairs; the unit is pages of predicted memory."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._num_held = 0
        self._refused: OrderedDict[str, float] = OrderedDict()

    def hold(self, tenant: str, pages: int) -> None:
        self._held[tenant] += pages
        self._num_held += pages
        self._refused.pop(tenant, None)

    def release(self, tenant: str, pages: int) -> None:
        self._num_held -= pages
        self._held[tenant] -= pages
        if not self._held[tenant]:
            del self._held[tenant]

    def refuse(self, tenant: str, now_s: float) -> None:
        self._refused.pop(tenant, None)
        self._refused[tenant] = now_s
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def factor(self, tenant: str, now_s: float) -> float:
        """What the limits are multiplied by for the next request of `tenant`: 1 or EARLIER."""
        while self._refused and next(iter(self._refused.values())) < now_s - REMEMBERED_S:
            self._refused.popitem(last=False)
        num_others = len((self._held.keys() | self._refused.keys()) - {tenant})
        if not num_others:
            return 1.0
        fair = self._num_held / (num_others + 1)
        return EARLIER if self._held[tenant] > fair else 1.0
