"""What is asked of every engine: a shape, how requests arrive, and the prompts of one round.

The same round gives every engine the same prompts, so that ratios are paired; another round gives
other prompts, so that none of them is answered from a prefix cache.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xllm.cli.bench.arrivals import arrival_times
from xllm.cli.bench.datasets import Ask, random_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`input_len` in words, about one token each; closed loop of `concurrency`, or open at `rate`/s."""

    input_len: int
    output_len: int
    num_requests: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def is_prefill(self) -> bool:
        """With one token of answer the time is the prompt's: prompt tokens/s are what counts."""
        return self.output_len == 1

    @property
    def speed_key(self) -> str:
        return "input_throughput" if self.is_prefill else "output_throughput"

    @property
    def name(self) -> str:
        if self.is_prefill:
            return f"prefill {self.concurrency} x {self.input_len}"
        arrival = f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"
        return f"{self.input_len} in / {self.output_len} out, {arrival}"

    def round(self, number: int) -> tuple[list[Ask], list[float]]:
        """Prompts and planned send times in seconds."""
        seed = (number, zlib.crc32(self.name.encode()))
        rng = np.random.default_rng(seed)
        asks = random_prompts(self.num_requests, self.input_len, self.output_len, rng)
        return asks, arrival_times(self.num_requests, self.rate or float("inf"), 1.0, rng)

    def warm_up(self) -> tuple[list[Ask], list[float]]:
        """As many requests as run at once, few tokens each: first use of every batch size is not measured."""
        rng = np.random.default_rng(zlib.crc32(b"warm" + self.name.encode()))
        num = min(self.concurrency or 8, self.num_requests)
        return random_prompts(num, self.input_len, min(4, self.output_len), rng), [0.0] * num


def loads(
    shapes: Sequence[tuple[int, int]],
    concurrencies: Sequence[int],
    rates: Sequence[float],
    num_requests: int | None,
    requests_per_slot: float,
) -> list[Load]:
    """Every shape at every concurrency and rate; by default long enough to hide how a run starts and ends."""
    made: list[Load] = []
    for input_len, output_len in shapes:
        for concurrency in concurrencies:
            num = num_requests or max(8, round(requests_per_slot * concurrency))
            made.append(
                Load(input_len=input_len, output_len=output_len, num_requests=num, concurrency=concurrency)
            )
        for rate in rates:
            # A p99 of less than a hundred requests is its maximum.
            num = num_requests or 300
            made.append(Load(input_len=input_len, output_len=output_len, num_requests=num, rate=rate))
    return made


def prefills(batches: Sequence[tuple[int, int]]) -> list[Load]:
    """(prompts at once, words of each); as many waves as make about 4,000 tokens, two at least."""
    return [
        Load(
            input_len=input_len,
            output_len=1,
            num_requests=num * max(2, round(4096 / (num * input_len))),
            concurrency=num,
        )
        for num, input_len in batches
    ]
