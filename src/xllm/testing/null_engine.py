"""An engine core on the null device: the real scheduler and memory over tokens that are hashes.

For tests and examples without a model. Nothing here is used by a serving process.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.config import SchedulerConfig
from xllm.engine.core import EngineCore
from xllm.engine.executor import InProcExecutor
from xllm.engine.memory.manager import PageManager, pages_for
from xllm.engine.platform.null_runner import NullRunner, empty_pages, token_pages
from xllm.engine.sampling import Sampler
from xllm.engine.scheduler.order import create_order
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.engine.surviving import Adopted, SharedPages, adopt
from xllm.testing.clock import FakeClock
from xllm.testing.fake_transfers import FakeTransfers, Wire
from xllm.types import PAGE_SIZE, KVGroup, KVLayout, ModelCard, RequestSpec, SamplingParams, TokenSegment
from xllm.wire.messages import Frame

VOCAB_SIZE = 512
EOS = 2

FULL = KVGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=16)
WINDOW = KVGroup(kind="window", layers=(1,), num_kv_heads=1, head_dim=16, window=100)


def null_card(num_pages: int, max_model_len: int = 2048) -> ModelCard:
    return ModelCard(
        model_id="null",
        aliases=(),
        architecture="null",
        weights_digest="null",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        head_width=VOCAB_SIZE,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        assets={},
        kv_layout_digest="null",
        numerics_class="null",
        deterministic=True,
        page_size=64,
        num_pages=num_pages,
    )


@dataclass(slots=True)
class NullEngine:
    """A core with its parts in reach."""

    core: EngineCore
    memory: PageManager
    runner: NullRunner
    clock: FakeClock
    adopted: Adopted | None = None
    transfers: FakeTransfers | None = None

    def run(self, max_steps: int = 10_000) -> list[Frame]:
        """Step until no request is left; every frame, with all output committed at once."""
        frames: list[Frame] = []
        for _ in range(max_steps):
            if not self.core.has_requests and not self.core.steps:
                return frames
            frames += self.step()
        raise AssertionError(f"requests are still alive after {max_steps} steps")

    def step(self) -> list[Frame]:
        """One step; commits what it put out, as a prompt front would."""
        _, frames = self.core.step()
        for frame in frames:
            self.core.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))
        self.memory.check()
        check_under_way(self)
        return list(frames)


def null_engine(
    *,
    num_pages: int = 64,
    groups: tuple[KVGroup, ...] = (FULL,),
    config: SchedulerConfig | None = None,
    enable_prefix_caching: bool = True,
    max_model_len: int = 2048,
    shared: SharedPages | None = None,
    wire: Wire | None = None,
    name: str = "",
    lookahead: bool = False,
) -> NullEngine:
    """A fresh engine; `num_pages` per group. With `shared` its pages outlive it, and `keeper` is set; with
    `wire` it exchanges pages with the others there, as `name`. With `lookahead` each step is planned before the
    one in front of it is collected."""
    config = config or SchedulerConfig()
    clock = FakeClock()
    memory = PageManager(groups, [num_pages] * len(groups), enable_prefix_caching)
    scheduler = Scheduler(
        config,
        memory,
        create_order(config.scheduling_policy),
        numerics_class="null",
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
    )
    layout = KVLayout(groups=groups, dtype="float32")
    per_group = [num_pages] * len(groups)
    kv = empty_pages(per_group) if shared is None else token_pages(shared, per_group)
    runner = NullRunner(layout, per_group, VOCAB_SIZE, Sampler(), kv=kv)
    card = null_card(num_pages, max_model_len)
    core = EngineCore(card, scheduler, memory, InProcExecutor(runner, lookahead=lookahead), clock)
    engine = NullEngine(core=core, memory=memory, runner=runner, clock=clock)
    if wire is not None:
        engine.transfers = FakeTransfers(wire, name, kv)
        core.join(engine.transfers)
    if shared is not None:
        core.keeper, engine.adopted = adopt(shared, memory, card.numerics_class, layout.digest())
    return engine


def check_under_way(engine: NullEngine) -> None:
    """Every page that a step under way reads or writes belongs to somebody, so nobody else is given it."""
    windows = [group.window for group in engine.runner.kv_layout.groups]
    for flight in engine.core.scheduler.flights:
        for entry in flight.plan.sequences:
            end = entry.start + len(entry.tokens)
            for g, (window, pages) in enumerate(zip(windows, entry.pages, strict=True)):
                first = 0 if window is None else max(0, entry.start - window + 1)
                for page in pages[first // PAGE_SIZE : pages_for(end)]:
                    if not engine.memory.is_owned(g, page):
                        raise AssertionError(f"page {page} of step {flight.plan.step} belongs to nobody")


def spec(request_id: str, prompt: tuple[int, ...], **fields: object) -> RequestSpec:
    """A request; RequestSpec fields by name, everything else goes to SamplingParams (greedy by default)."""
    own = {k: fields.pop(k) for k in tuple(fields) if k in RequestSpec.__struct_fields__}
    fields.setdefault("temperature", 0.0)
    fields.setdefault("seed", 1)
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    own.setdefault("model", "null")
    return RequestSpec(request_id=request_id, segments=(TokenSegment(prompt),), params=params, **own)  # type: ignore[arg-type]


def outputs(frames: list[Frame]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Tokens per (request, choice), checking that offsets are gapless."""
    collected: dict[tuple[str, int], tuple[int, ...]] = {}
    for frame in frames:
        key = (frame.request_id, frame.choice)
        tokens = collected.get(key, ())
        if frame.tokens and frame.offset != len(tokens):
            raise AssertionError(f"frame at offset {frame.offset} after {len(tokens)} tokens")
        if frame.tokens or frame.error is None:
            collected[key] = (*tokens, *frame.tokens)
    return collected
