"""What moving bytes between two instances takes: measured by the moves that were made, per direction.

Bookkeeping of numbers; decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict

from xllm.cost import TransferCost, TransferFitter
from xllm.service.failover.decision import ASSUMED_LINK

MAX_LINKS = 1024
PROBE_EVERY = 32
"""Moves over a link that was judged too slow until one is made all the same: a link that was slow once
would else never be measured again."""


class Links:
    """Owned by one front. A pair that was never measured is taken to be like the others, all together."""

    def __init__(self) -> None:
        self._of_pair: OrderedDict[tuple[str, str], TransferFitter] = OrderedDict()
        self._of_all = TransferFitter()
        self._num_skipped: dict[tuple[str, str], int] = {}

    def observe(self, source: str, target: str, num_bytes: int, elapsed_ms: float) -> None:
        pair = (source, target)
        fitter = self._of_pair.setdefault(pair, TransferFitter())
        self._of_pair.move_to_end(pair)
        fitter.observe(num_bytes, elapsed_ms)
        self._of_all.observe(num_bytes, elapsed_ms)
        self._num_skipped.pop(pair, None)
        while len(self._of_pair) > MAX_LINKS:
            oldest, _ = self._of_pair.popitem(last=False)
            self._num_skipped.pop(oldest, None)

    def known(self, source: str, target: str) -> TransferCost | None:
        """None until something was measured, here or elsewhere."""
        fitter = self._of_pair.get((source, target))
        own = None if fitter is None else fitter.cost()
        return own if own is not None else self._of_all.cost()

    def price(self, source: str, target: str) -> TransferCost:
        """As `known`; what is assumed of a link until then."""
        known = self.known(source, target)
        return ASSUMED_LINK if known is None else known

    def probe(self, source: str, target: str) -> bool:
        """Of a move that would not pay: whether to make it, to see whether that still holds."""
        pair = (source, target)
        if pair not in self._of_pair:
            return False
        num = self._num_skipped[pair] = self._num_skipped.get(pair, 0) + 1
        return num % PROBE_EVERY == 0
