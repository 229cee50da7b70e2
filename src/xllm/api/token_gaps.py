"""The histogram of gaps between tokens: the one observation that is made for every token of every stream.

The library's own histogram adds up in Python, bucket by bucket under locks; this one counts on the front's
loop and is rendered when somebody asks. What it exports is the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class _Series:
    """Of one model. `counts` are per bucket, the last one without a bound; not cumulated."""

    __slots__ = ("counts", "sum")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)
        self.sum = 0.0


class TokenGaps(Collector):
    """Written on one thread; a scrape on another may see one observation less."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._bounds = name, help, tuple(bounds)
        self._of: dict[str, _Series] = {}

    def observe(self, model: str, gap_s: float) -> None:
        series = self._of.get(model)
        if series is None:
            series = self._of[model] = _Series(len(self._bounds))
        series.counts[bisect_left(self._bounds, gap_s)] += 1
        series.sum += gap_s

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=["model_name"])
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        for model, series in self._of.items():
            total, buckets = 0, []
            for bound, count in zip(bounds, series.counts, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric([model], buckets, series.sum)
        yield family
