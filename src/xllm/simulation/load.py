"""Load that shifts: arrivals by phase, clients that read at once, and who got what was promised.

Values and measuring; which cluster serves it, and by which policy, is the experiment's choice.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from xllm.errors import XllmError
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.types import SLO, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPhase:
    """Poisson arrivals. Lengths are log-normal around their medians with `spread` = σ of the logarithm."""

    name: str
    lasts_s: float
    rate: float
    prompt_len: int
    output_len: int
    spread: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    at_s: float
    phase: str
    prompt_len: int
    output_len: int


@dataclass(slots=True)
class Served:
    """`decode_s` = first to last token, `second_s` first to second. No tokens = refused or failed."""

    request: LoadRequest
    ttft_s: float = float("inf")
    decode_s: float = 0.0
    second_s: float = 0.0
    num_tokens: int = 0
    longest_gap_s: float = 0.0
    ended: bool = False

    @property
    def tpot_s(self) -> float:
        return self.decode_s / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    def keeps(self, slo: SLO) -> bool:
        """Complete, its first token and the mean time between the others in time."""
        return (
            self.ended
            and (slo.ttft_ms is None or self.ttft_s * 1000 <= slo.ttft_ms)
            and (slo.tpot_ms is None or self.tpot_s * 1000 <= slo.tpot_ms)
        )


def draw_load(
    phases: Sequence[LoadPhase], rng: random.Random, *, max_prompt_len: int, max_output_len: int
) -> tuple[LoadRequest, ...]:
    """All requests in order of arrival."""
    requests: list[LoadRequest] = []
    begin_s = 0.0
    for phase in phases:
        at_s = begin_s + rng.expovariate(phase.rate)
        while at_s < begin_s + phase.lasts_s:
            prompt = int(phase.prompt_len * rng.lognormvariate(0.0, phase.spread))
            output = int(phase.output_len * rng.lognormvariate(0.0, phase.spread))
            requests.append(
                LoadRequest(
                    at_s=at_s,
                    phase=phase.name,
                    prompt_len=min(max(prompt, 1), max_prompt_len),
                    output_len=min(max(output, 1), max_output_len),
                )
            )
            at_s += rng.expovariate(phase.rate)
        begin_s += phase.lasts_s
    return tuple(requests)


async def serve_load(front: Front, requests: Sequence[LoadRequest], slo: SLO) -> list[Served]:
    """Submit each at its time and read them all to their ends."""
    loop = asyncio.get_running_loop()
    origin_s = loop.time()

    async def one(number: int, request: LoadRequest) -> Served:
        await asyncio.sleep(origin_s + request.at_s - loop.time())
        return await _read(front, number, request, slo)

    tasks = [loop.create_task(one(i, r), name=f"client {i}") for i, r in enumerate(requests)]
    return list(await asyncio.gather(*tasks))


async def _read(front: Front, number: int, request: LoadRequest, slo: SLO) -> Served:
    loop = asyncio.get_running_loop()
    served = Served(request)
    begun_s = last_s = loop.time()
    try:
        stream = await front.submit(_draft(number, request, slo))
        async for delta in stream:
            now_s = loop.time()
            if served.num_tokens == 0:
                served.ttft_s = now_s - begun_s
            else:
                if served.decode_s == 0.0:
                    served.second_s = now_s - last_s
                served.decode_s += now_s - last_s
                served.longest_gap_s = max(served.longest_gap_s, now_s - last_s)
            served.num_tokens += len(delta.token_ids)
            last_s = now_s
    except XllmError:
        return served
    served.ended = served.num_tokens == request.output_len
    return served


def _draft(number: int, request: LoadRequest, slo: SLO) -> RequestDraft:
    # The first page names the request, so that no prefix is shared: caches are other experiments' matter.
    first = (3 + number % 200, 3 + number // 200 % 200, 3 + number // 40_000)
    return RequestDraft(
        model="simulated",
        prompt_token_ids=(*first, *(7,) * request.prompt_len)[: max(request.prompt_len, len(first))],
        params=SamplingParams(
            max_tokens=request.output_len, temperature=0.0, ignore_eos=True, detokenize=False
        ),
        slo=slo,
    )
