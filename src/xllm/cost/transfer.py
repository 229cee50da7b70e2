"""Bytes → ms over one link: a latency and a bandwidth, fitted to the transfers that were made.

For decisions between recomputing and moving. Makes no transfer and knows none of the transports.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORGET = 0.97
_MIN_TRANSFERS = 4


@dataclass(frozen=True, slots=True)
class TransferCost:
    """`bytes_per_ms` > 0."""

    latency_ms: float
    bytes_per_ms: float

    def transfer_ms(self, num_bytes: int) -> float:
        return self.latency_ms + num_bytes / self.bytes_per_ms


class TransferFitter:
    """Weighted regression of ms on bytes with forgetting; `cost()` is None until a few transfers were seen.

    Each weighs 1 ÷ ms², so that a stalled one is weak and small ones determine the latency.
    """

    __slots__ = ("_n", "_num", "_x", "_xt", "_xx", "_t")

    def __init__(self) -> None:
        self._num = 0
        self._n = self._x = self._t = self._xx = self._xt = 0.0

    def observe(self, num_bytes: int, elapsed_ms: float) -> None:
        if num_bytes <= 0 or not 0.0 < elapsed_ms < 1e9:
            return
        weight = 1.0 / max(elapsed_ms, 1e-3) ** 2
        size = float(num_bytes)
        self._num += 1
        self._n = self._n * _FORGET + weight
        self._x = self._x * _FORGET + weight * size
        self._t = self._t * _FORGET + weight * elapsed_ms
        self._xx = self._xx * _FORGET + weight * size * size
        self._xt = self._xt * _FORGET + weight * size * elapsed_ms

    def cost(self) -> TransferCost | None:
        if self._num < _MIN_TRANSFERS:
            return None
        spread = self._n * self._xx - self._x * self._x
        through_origin = self._xt / self._xx
        if spread <= 1e-9 * self._n * self._xx:
            # One size only: nothing tells latency from bandwidth, and the time per byte is the safer half.
            return TransferCost(0.0, 1.0 / through_origin)
        slope = (self._n * self._xt - self._x * self._t) / spread
        latency = (self._t - slope * self._x) / self._n
        if latency < 0.0:
            return TransferCost(0.0, 1.0 / through_origin)
        if slope <= 0.0:
            # Larger transfers were not slower: no time per byte can be told, and none is assumed.
            return TransferCost(self._t / self._n, float("inf"))
        return TransferCost(latency, 1.0 / slope)
