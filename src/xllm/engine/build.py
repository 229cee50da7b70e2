"""Putting an engine together: model files → platform → runner → memory → scheduler → core.

The one place that knows all of them. No policy and no maths; every choice comes back as a report
line with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from xllm.arch import ArchConfig
from xllm.artifacts.resolve import resolve, resolve_assets
from xllm.artifacts.source import ModelSource
from xllm.clock import Clock, SystemClock
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.engine.executor import InProcExecutor
from xllm.engine.fitting import MemoryPlan
from xllm.engine.kvtransfer.base import TransferEvent
from xllm.engine.kvtransfer.memory import KVMemory
from xllm.engine.kvtransfer.opening import open_plane, pages_for_peers
from xllm.engine.kvtransfer.plane import DataPlane
from xllm.engine.memory.manager import PageManager
from xllm.engine.platform.base import KeepsPages, PlansMemory, Runner, StepQueue, TellsLayers
from xllm.engine.platform.host import bind_to_cpus
from xllm.engine.platform.registry import select_platform
from xllm.engine.profiling import EngineProfile
from xllm.engine.progress import StepProgress
from xllm.engine.runner.kv_size import page_bytes_of
from xllm.engine.sampling import Sampler, load_processors
from xllm.engine.scheduler.order import create_order
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.engine.surviving import SharedPages, adopt
from xllm.errors import ConfigError
from xllm.types import ModelCard
from xllm.wire.hello import Identity
from xllm.wire.messages import Ready

Progress = Callable[[str, float], None]
"""(stage that just ended, seconds it took)."""

OnAssets = Callable[[Mapping[str, bytes]], None]
"""Gets the text assets by name, long before the weights are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """`assets` maps digest → bytes; `report` holds one line per choice made, with its reason."""

    core: EngineCore
    runner: Runner
    memory: PageManager
    assets: Mapping[str, bytes]
    report: tuple[str, ...]
    pages: KVMemory | None = None
    """What can be exchanged with peers; None = nothing."""


class _Stages:
    """Tells the front what each stage of loading took."""

    def __init__(self, clock: Clock, progress: Progress) -> None:
        self._clock = clock
        self._progress = progress
        self._since_s = clock.monotonic_s()

    def done(self, stage: str) -> None:
        now_s = self._clock.monotonic_s()
        self._progress(stage, now_s - self._since_s)
        self._since_s = now_s


def build_engine(
    config: EngineConfig,
    clock: Clock,
    progress: Progress,
    on_assets: OnAssets = lambda assets: None,
    shared: SharedPages | None = None,
) -> BuiltEngine:
    """An engine ready to step, with its pages in `shared` if the platform can.

    Raises ConfigError with field, value and remedy.
    """
    stages = _Stages(clock, progress)
    order = create_order(config.scheduler.scheduling_policy)
    sampler = Sampler(load_processors(config.scheduler.logits_processors))
    source = resolve(
        config.model.model,
        revision=config.model.revision,
        load_format=config.model.load_format,
        seed=config.model.seed,
    )
    arch = source.arch()
    assets = resolve_assets(source, config.model.tokenizer, config.model.chat_template)
    on_assets(assets)
    stages.done("model files found and read")
    platform, reasons = select_platform(config, arch)
    if shared is not None and isinstance(platform, KeepsPages):
        platform = platform.over(shared)
    stages.done(f"platform {platform.name} ready")
    max_model_len, why_len = _max_model_len(config, arch)
    built = platform.create_runner(arch, source.tensors(), config, max_model_len, sampler)
    stages.done("weights loaded")
    runner = built.runner
    memory = PageManager(runner.kv_layout.groups, built.num_pages, config.cache.enable_prefix_caching)
    if built.mapper is not None:
        memory.map_into(built.mapper)
    card = _card(config, source, arch, assets, runner, built.num_pages, max_model_len, clock)
    scheduler = Scheduler(
        config.scheduler,
        memory,
        order,
        numerics_class=card.numerics_class,
        max_model_len=max_model_len,
        eos_token_ids=card.eos_token_ids,
    )
    lookahead, why_ahead = _lookahead(config, runner)
    executor = InProcExecutor(runner, lookahead=lookahead, clock=clock)
    core = EngineCore(
        card,
        scheduler,
        memory,
        executor,
        clock,
        lambda: runner.program_counters,
        progress=StepProgress(lambda: runner.finished_layers),
        profile=_profile(runner, clock),
    )
    kept: tuple[str, ...] = ()
    if shared is not None and shared.lasting and shared.groups:
        core.keeper, adopted = adopt(shared, memory, card.numerics_class, card.kv_layout_digest)
        kept = (adopted.line(),)
    return BuiltEngine(
        core=core,
        runner=runner,
        memory=memory,
        assets={_digest(data): data for data in assets.values()},
        report=(*reasons, why_len, *built.report, why_ahead, *kept),
        pages=runner.kv_memory(shared),
    )


def _profile(runner: Runner, clock: Clock) -> EngineProfile:
    if isinstance(runner, TellsLayers):
        return EngineProfile(clock, runner.trace_layers, runner.layer_stamps)
    return EngineProfile(clock)


def plan_memory(config: EngineConfig) -> MemoryPlan | None:
    """What an engine with this configuration would take; None where its platform does not say.

    Of a model that is on this machine; loads nothing. Raises ConfigError as `build_engine` would.
    """
    model = config.model
    source = resolve(
        model.model, revision=model.revision, load_format=model.load_format, seed=model.seed, allow_pull=False
    )
    arch = source.arch()
    platform, _ = select_platform(config, arch)
    if not isinstance(platform, PlansMemory):
        return None
    return platform.plan_memory(arch, source.tensors(), config, _max_model_len(config, arch)[0])


def _lookahead(config: EngineConfig, runner: Runner) -> tuple[bool, str]:
    """Whether the next step is planned while one runs, and why."""
    asked = config.scheduler.async_scheduling
    if asked == "off":
        return False, "async_scheduling=off: as asked"
    if isinstance(runner, StepQueue):
        return True, "async_scheduling=on: the next step is handed over while one runs"
    if asked == "on":
        raise ConfigError(
            "async_scheduling: on, but this platform runs one step at a time here; leave it at auto",
            param="async_scheduling",
        )
    return False, "async_scheduling=off: this platform runs one step at a time here"


def build_here(
    config: EngineConfig,
    progress: Progress,
    on_assets: OnAssets = lambda assets: None,
    pages_fd: int | None = None,
) -> BuiltEngine:
    """`build_engine` for a process that is to be this engine and nothing else."""
    # First: whatever is started and counted from here on knows these CPUs only.
    bound = bind_to_cpus(config.platform.cpus)
    shared = pages_for_peers(config.transfer) if pages_fd is None else SharedPages(pages_fd)
    engine = build_engine(config, SystemClock(), progress, on_assets, shared)
    return engine if bound is None else replace(engine, report=(bound, *engine.report))


def join_peers(
    engine: BuiltEngine, config: EngineConfig, identity: Identity, tell: Callable[[TransferEvent], None]
) -> DataPlane | None:
    """Exchange pages with engines that prove to have `identity`'s key; None where transfers are off.

    To be closed before the engine: a peer may be writing into its pages. Raises ConfigError.
    """
    plane = open_plane(config.transfer, engine.core.card, engine.pages, identity, tell, engine.runner)
    if plane is not None:
        engine.core.join(plane)
    return plane


def ready_of(engine: BuiltEngine, config: EngineConfig, endpoints: tuple[str, ...] = ()) -> Ready:
    """What a front is told of a loaded engine."""
    scheduler = config.scheduler
    kinds = ", ".join(dict.fromkeys(endpoint.partition(":")[0] for endpoint in endpoints))
    return Ready(
        card=engine.core.card,
        pid=os.getpid(),
        report=(*engine.report, f"pages from and to peers: {kinds or 'none'}"),
        endpoints=endpoints,
        max_reqs=scheduler.max_num_seqs + scheduler.max_num_queued_reqs,
    )


def _max_model_len(config: EngineConfig, arch: ArchConfig) -> tuple[int, str]:
    asked = config.model.max_model_len
    if asked is None:
        return arch.max_position, f"max_model_len={arch.max_position}: the model's own limit"
    if not 1 < asked <= arch.max_position:
        raise ConfigError(
            f"max_model_len={asked}: must be between 2 and the model's {arch.max_position}",
            param="max_model_len",
        )
    return asked, f"max_model_len={asked}: as asked (the model allows {arch.max_position})"


def _page_bytes(runner: Runner) -> int:
    """What a hand-over of a page moves; where no real KV is kept that is not what the layout says."""
    memory = runner.kv_memory()
    if memory is not None:
        return sum(memory.page_bytes)
    return sum(page_bytes_of(g, runner.kv_layout.dtype) for g in runner.kv_layout.groups)


def _card(
    config: EngineConfig,
    source: ModelSource,
    arch: ArchConfig,
    assets: Mapping[str, bytes],
    runner: Runner,
    num_pages: tuple[int, ...],
    max_model_len: int,
    clock: Clock,
) -> ModelCard:
    names = config.model.served_model_name or (config.model.model, source.model_id)
    layout = runner.kv_layout.digest()
    weights = source.weights_digest()
    return ModelCard(
        model_id=names[0],
        aliases=tuple(dict.fromkeys(n for n in names[1:] if n != names[0])),
        architecture=arch.name,
        weights_digest=weights,
        dtype=runner.kv_layout.dtype,
        vocab_size=arch.vocab_size,
        head_width=arch.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=arch.eos_token_ids,
        assets={name: _digest(data) for name, data in assets.items()},
        kv_layout_digest=layout,
        numerics_class=_numerics_class(weights, layout, runner.numerics),
        deterministic=runner.deterministic,
        page_size=runner.kv_layout.page_size,
        num_pages=sum(num_pages),
        page_bytes=_page_bytes(runner),
        generation_config=dict(source.generation_config()),
        created_s=int(clock.wall_s()),
    )


def _numerics_class(weights: str, layout: str, numerics: tuple[str, ...]) -> str:
    """Digest of everything that may change a bit of the logits; design §1."""
    return hashlib.sha256(msgspec.msgpack.encode((weights, layout, numerics))).hexdigest()[:32]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
