"""What a front remembers of its own placements between two decisions: recent work per instance, and the
pages that requests on their way will leave. Policies stay functions; this fills their views.

Bookkeeping only: told by the front what was placed and what has answered. Reads no clock: old work fades
with new placements, not with time, so a quiet hour changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from xllm.types import PAGE_SIZE

EXPECTED = "expected"
WINDOW_REQS = 128
"""Placements per instance after which older ones have faded to a third."""


class PlacementMemory:
    """Owned by one front. Every `placed` is followed by one `settled` of the same id when the request ends or
    waits for another instance; more of them do no harm.

    While it runs its prompt's pages are certain to be there or to come, so they stay expected; what the
    index has heard of by then counts as what it is.
    """

    def __init__(self) -> None:
        self._recent_ms: dict[str, float] = {}
        self._expected: dict[str, dict[bytes, int]] = {}
        self._pending: dict[str, tuple[str, tuple[bytes, ...]]] = {}

    def placed(
        self,
        request_id: str,
        instance: str,
        work_ms: float,
        among: Collection[str],
        chain: Sequence[bytes] = (),
    ) -> None:
        """`among`: the names the policy chose from; `chain`: the digests of the prompt's full pages."""
        self.settled(request_id)
        fade = 1.0 - 1.0 / (WINDOW_REQS * max(1, len(among)))
        usual_ms = self._usual_ms(among)
        for name in among:
            # One that has just come starts as one of many: as an empty one it would be given everything.
            self._recent_ms[name] = self._recent_ms.get(name, usual_ms) * fade
        self._recent_ms[instance] = self._recent_ms.get(instance, usual_ms) + max(0.0, work_ms)
        expected = self._expected.setdefault(instance, {})
        for digest in chain:
            expected[digest] = expected.get(digest, 0) + 1
        self._pending[request_id] = (instance, tuple(chain))

    def settled(self, request_id: str) -> None:
        """Its pages are the index's business now, or will never come. Unknown ids are fine."""
        instance, chain = self._pending.pop(request_id, ("", ()))
        expected = self._expected.get(instance, {})
        for digest in chain:
            num = expected.get(digest, 0) - 1
            if num > 0:
                expected[digest] = num
            else:
                expected.pop(digest, None)

    def purge(self, instance: str) -> None:
        """It is gone: nothing is expected of it, and one of that name starts afresh."""
        self._recent_ms.pop(instance, None)
        self._expected.pop(instance, None)
        gone = [request_id for request_id, (name, _) in self._pending.items() if name == instance]
        for request_id in gone:
            del self._pending[request_id]

    def recent_ms(self, among: Collection[str]) -> dict[str, float]:
        """Recent work of each of these."""
        usual_ms = self._usual_ms(among)
        return {name: self._recent_ms.get(name, usual_ms) for name in among}

    def matched(
        self, instance: str, chain: Sequence[bytes], found: Sequence[tuple[str, int]] = ()
    ) -> tuple[tuple[str, int], ...]:
        """`InstanceView.matched`: what the index found there, in tokens, and the pages beyond it that
        requests on their way will leave. `found` counts pages, as `KvIndex.match` answers."""
        num_found = sum(num for _, num in found)
        num_expected = 0
        expected = self._expected.get(instance)
        if expected:
            while num_found + num_expected < len(chain) and chain[num_found + num_expected] in expected:
                num_expected += 1
        tokens = tuple((tier, num * PAGE_SIZE) for tier, num in found)
        return (*tokens, (EXPECTED, num_expected * PAGE_SIZE)) if num_expected else tokens

    def _usual_ms(self, among: Collection[str]) -> float:
        known = [self._recent_ms[name] for name in among if name in self._recent_ms]
        return sum(known) / len(known) if known else 0.0
