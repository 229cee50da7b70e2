"""What a run of requests means in numbers: latencies, throughput, goodput.

Definitions: TTFT = first output − send. ITL = gaps between consecutive output chunks, all pooled.
TPOT = (E2EL − TTFT) / (output tokens − 1) of a request, 0 when it has one token. E2EL = last byte −
send. Goodput = requests that meet all objectives, per second. Failed requests count in nothing but
`failed`. JSON keys are those of vLLM's `bench serve`, so that its plots can be reused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xllm.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request as the client saw it. Times are in seconds from the start of the run."""

    start_s: float
    ttft_s: float = 0.0
    end_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    error: str = ""
    lateness_s: float = 0.0
    """How much later than planned the client sent it: its own limit, not the server's."""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def e2el_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float:
        if self.num_output_tokens < 2:
            return 0.0
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` → milliseconds by metric."""
    objectives: dict[str, float] = {}
    for word in words:
        name, colon, text = word.partition(":")
        try:
            limit_ms = float(text)
        except ValueError:
            limit_ms = math.nan
        if name not in OBJECTIVES or not colon or not limit_ms > 0:
            raise ConfigError(
                f"--goodput {word}: write {' or '.join(f'{n}:MS' for n in OBJECTIVES)}, e.g. ttft:500"
            )
        objectives[name] = limit_ms
    return objectives


def meets(outcome: Outcome, objectives_ms: Mapping[str, float]) -> bool:
    """All objectives kept. A failed request keeps none."""
    seen_ms = {
        "ttft": outcome.ttft_s * 1e3,
        "tpot": outcome.tpot_s * 1e3,
        "e2el": outcome.e2el_s * 1e3,
    }
    return outcome.ok and all(seen_ms[name] <= limit for name, limit in objectives_ms.items())


def summarise(outcomes: Sequence[Outcome], objectives_ms: Mapping[str, float]) -> dict[str, Any]:
    """Totals, throughputs and the distribution of every latency, in vLLM's keys."""
    done = [outcome for outcome in outcomes if outcome.ok]
    duration = max((outcome.end_s for outcome in outcomes), default=0.0)
    per_second = 1.0 / duration if duration > 0 else 0.0
    num_input = sum(outcome.num_input_tokens for outcome in done)
    num_output = sum(outcome.num_output_tokens for outcome in done)
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) * per_second,
        "output_throughput": num_output * per_second,
        "total_token_throughput": (num_input + num_output) * per_second,
        "max_output_tokens_per_s": peak_output_rate(done),
        "max_concurrent_requests": peak_concurrency(outcomes),
    }
    if objectives_ms:
        good = sum(meets(outcome, objectives_ms) for outcome in outcomes)
        summary["request_goodput"] = good * per_second
        summary["slo_attainment"] = good / len(outcomes) if outcomes else 0.0
    series = {
        "ttft": [outcome.ttft_s for outcome in done],
        "tpot": [outcome.tpot_s for outcome in done if outcome.num_output_tokens > 1],
        "itl": [gap for outcome in done for gap in outcome.itls_s],
        "e2el": [outcome.e2el_s for outcome in done],
    }
    for name, values in series.items():
        summary |= distribution(name, [value * 1e3 for value in values])
    summary["max_client_lateness_ms"] = max((o.lateness_s for o in outcomes), default=0.0) * 1e3
    return summary


def distribution(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    """mean, median, std (population) and percentiles (linear interpolation); zeros when empty."""
    data = np.asarray(values_ms if values_ms else [0.0], dtype=np.float64)
    row = {
        f"mean_{name}_ms": float(data.mean()),
        f"median_{name}_ms": float(np.median(data)),
        f"std_{name}_ms": float(data.std()),
    }
    return row | {f"p{p}_{name}_ms": float(np.percentile(data, p)) for p in PERCENTILES}


def peak_output_rate(outcomes: Sequence[Outcome]) -> float:
    """Most output tokens in one whole second of the run; tokens are spread evenly over the chunks."""
    seconds: dict[int, float] = {}
    for outcome in outcomes:
        at = outcome.start_s + outcome.ttft_s
        times = [at]
        for gap in outcome.itls_s:
            at += gap
            times.append(at)
        for moment in times:
            second = int(moment)
            seconds[second] = seconds.get(second, 0.0) + outcome.num_output_tokens / len(times)
    return max(seconds.values(), default=0.0)


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """Most requests under way at one moment; one that ends as another starts does not overlap it."""
    events = [(outcome.start_s, 1) for outcome in outcomes] + [(outcome.end_s, -1) for outcome in outcomes]
    running = peak = 0
    for _, step in sorted(events):
        running += step
        peak = max(peak, running)
    return peak
