"""Two engines and their front, for the hand-over benchmarks: requests whose tokens are stamped as they come.

What is done to a request while it runs must not live here.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig
from xllm.config.load import from_keywords
from xllm.service.draft import RequestDraft
from xllm.service.front import Front
from xllm.service.handover.record import HandoverRecord
from xllm.service.instances.about import InstanceAbout
from xllm.service.instances.local import LocalEngine
from xllm.service.live import LiveRequest
from xllm.service.router.base import Placement, RequestView, RouterSnapshot
from xllm.service.snapshot import NullObserver
from xllm.types import ModelCard, SamplingParams

FIRST, SECOND = "engine-0", "engine-1"


@dataclass(slots=True)
class Route:
    """The router's policy: everything to `instance`; `hands_over` = and on to the second."""

    hands_over: bool = False
    instance: str = FIRST

    def __call__(
        self, request: RequestView, snapshot: RouterSnapshot, config: FrontConfig
    ) -> Placement | None:
        decode = SECOND if self.hands_over else None
        return Placement(instance=self.instance, reasons=("as asked",), decode=decode)


@dataclass(slots=True)
class Records(NullObserver):
    """`at_s` are the times of their arrival."""

    records: list[HandoverRecord] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

    def on_handover(self, record: HandoverRecord) -> None:
        self.records.append(record)
        self.at_s.append(time.perf_counter())


@dataclass(frozen=True, slots=True)
class Run:
    """Times of one request's tokens, from its submission."""

    token_s: list[float]

    @property
    def ttft_ms(self) -> float:
        return self.token_s[0] * 1000

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1000 for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Bench:
    """The front, its engines, and what it was told of hand-overs."""

    def __init__(self, front: Front, route: Route, seen: Records, card: ModelCard) -> None:
        self.front = front
        self.route = route
        self.seen = seen
        self._model, self._num_tokens = card.model_id, min(20000, card.vocab_size)
        self._random = random.Random(7)

    async def submit(self, prompt_len: int, num_tokens: int) -> LiveRequest:
        prompt = tuple(
            self._random.randrange(self._num_tokens // 4, self._num_tokens) for _ in range(prompt_len)
        )
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=1, ignore_eos=True)
        draft = RequestDraft(model=self._model, prompt_token_ids=prompt, params=params)
        return await self.front.submit(draft)

    async def run(self, prompt_len: int, num_tokens: int) -> Run:
        began_s = time.perf_counter()
        live = await self.submit(prompt_len, num_tokens)
        token_s: list[float] = []
        async for delta in live:
            token_s += [time.perf_counter() - began_s] * len(delta.token_ids)
        return Run(token_s)


async def open_bench(
    model: str, transfer: str, mode: str, max_model_len: int, quantize: str
) -> tuple[Bench, list[LocalEngine]]:
    route, seen = Route(), Records()
    # A prompt is one long step here, and slow where something else runs too: nobody is suspected for it.
    settings = {"transfer_mode": mode, "max_queue_delay_s": 0.0, "suspect_floor_s": 60.0}
    front_config = from_keywords(FrontConfig, settings)
    front = Front(front_config, route, SystemClock(), observer=seen)
    config = from_keywords(
        EngineConfig,
        {
            "model": model,
            "quantize": quantize,
            "transfer": transfer,
            "max_model_len": max_model_len,
            "num_pages": 3 * -(-max_model_len // 64) + 8,
            "num_local_instances": 2,
            "enable_prefix_caching": False,
        },
    )
    engines = []
    for name in (FIRST, SECOND):
        engine = await LocalEngine.launch(config)
        about = InstanceAbout(pid=engine.pid, endpoints=engine.endpoints)
        await front.add_instance(engine.stream, engine.card, name=name, max_reqs=engine.max_reqs, about=about)
        engines.append(engine)
    return Bench(front, route, seen, engines[0].card), engines


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)
