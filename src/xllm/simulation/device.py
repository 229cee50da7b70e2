"""What a simulated engine computes with: the null device, a memory of its draws, and virtual step times.

The real core, scheduler, page manager and sampler over tokens that are hashes of what the pages hold;
only the time a step takes is made up. No event loop here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import xxhash

from xllm.clock import Clock
from xllm.config import SchedulerConfig
from xllm.cost import StepCost, attention_work
from xllm.engine.core import EngineCore
from xllm.engine.executor import InProcExecutor
from xllm.engine.memory.manager import PageManager, pages_for
from xllm.engine.plan import ChoiceTokens, SampledToken, SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.platform.null_runner import NullRunner, TokenPages
from xllm.engine.sampling import Sampler
from xllm.engine.scheduler.order import create_order
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.errors import InternalError
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.types import PAGE_SIZE, KVGroup, KVLayout, ModelCard

VOCAB_SIZE = 264
EOS = 2
POISON = VOCAB_SIZE - 1
"""A prompt that begins with this token kills the engine that computes it."""
MAX_MODEL_LEN = 512
NUMERICS_CLASS = "simulated"

FULL = KVGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=16)
WINDOW = KVGroup(kind="window", layers=(1,), num_kv_heads=1, head_dim=16, window=100)

TEXT_ASSETS = tiny_assets(VOCAB_SIZE)
ASSETS = {hashlib.sha256(data).hexdigest(): data for data in TEXT_ASSETS.values()}


SMOLLM2_ON_TWO_CORES = StepCost((2.0, 0.1, 0.0002, 0.15, 0.0005))
"""About what steps of SmolLM2 take there, in ms; see `StepCost` for the terms."""


class Draws:
    """What the device answered before, by everything an answer depends on.

    Recomputing is most of what faults cause, and a draw costs more than all else in a simulated step.
    A wrong page still gives another key, so nothing is hidden by it.
    """

    def __init__(self) -> None:
        self.known: dict[bytes, SequenceResult] = {}


class SimRunner(NullRunner):
    """The null device with a memory shared by all engines of one simulation."""

    def __init__(self, layout: KVLayout, num_pages: int, draws: Draws) -> None:
        super().__init__(layout, [num_pages] * len(layout.groups), VOCAB_SIZE, Sampler())
        self._draws = draws

    @property
    def memory(self) -> list[TokenPages]:
        """What the pages of each group hold; a transfer reads and writes it."""
        return self._kv

    def check(self, entry: SequencePlan, tokens: Sequence[int]) -> None:
        """Compare all that the first row of `entry` attends to with the sequence's own `tokens`."""
        if entry.start == 0:
            return
        for group, window in enumerate(self._windows):
            first = 0 if window is None else max(0, entry.start - window + 1)
            page = first // PAGE_SIZE
            pages = entry.pages[group][page : pages_for(entry.start)]
            if min(pages, default=0) < 0:
                raise WrongKvError(f"group {group}: a page that row {entry.start} needs was given back")
            held = self._kv[group][list(pages)].reshape(-1)[first - page * PAGE_SIZE :]
            if held[: entry.start - first].tolist() != list(tokens[first : entry.start]):
                raise WrongKvError(f"group {group}: positions {first}-{entry.start} hold others' tokens")

    def _sequence(self, entry: SequencePlan) -> SequenceResult:
        if entry.sample is None or entry.prompt_logprobs is not None:
            return super()._sequence(entry)
        self._write(entry)
        position = entry.start + len(entry.tokens) - 1
        seen = [self._visible(g, entry, position).tobytes() for g in range(len(self._kv))]
        key = xxhash.xxh3_128_digest(b"|".join((msgspec.msgpack.encode(entry.sample), *seen)))
        known = self._draws.known.get(key)
        if known is None:
            known = self._draws.known[key] = super()._sequence(entry)
        return msgspec.structs.replace(known, seq_id=entry.seq_id)


class TimeRunner(SimRunner):
    """For experiments with time: one token for all; nothing is read, so nothing can be found wrong."""

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(step=plan.step, sequences=tuple(_same_token(entry) for entry in plan.sequences))

    def check(self, entry: SequencePlan, tokens: Sequence[int]) -> None:
        return


def _same_token(entry: SequencePlan) -> SequenceResult:
    if entry.sample is None:
        return SequenceResult(seq_id=entry.seq_id)
    drawn = tuple(ChoiceTokens(choice=c, tokens=_TOKEN) for c in entry.sample.choices)
    return SequenceResult(seq_id=entry.seq_id, choices=drawn)


_TOKEN = (SampledToken(token_id=5),)


class WrongKvError(Exception):
    """A sequence stood on pages that hold something else than its tokens: a bug, whatever comes of it."""


class DeviceLostError(Exception):
    """A request took the device down, and the process with it."""


TokensOf = Callable[[int], Sequence[int] | None]
"""All tokens of a sequence in the oldest step under way; None = it has ended since."""


class SimExecutor(InProcExecutor):
    """Runs a step at once when it begins, and says how long it would have taken."""

    def __init__(
        self, runner: SimRunner, step_time: StepCost, tokens_of: TokensOf, *, lookahead: bool = False
    ) -> None:
        super().__init__(runner, lookahead=lookahead)
        self._runner: SimRunner = runner
        self._step_time = step_time
        self._tokens_of = tokens_of
        self._result: StepResult | None = None
        self.slowdown = 1.0
        self.last_step_ms = 0.0

    def submit(self, plan: StepPlan) -> None:
        if len({entry.seq_id for entry in plan.sequences}) != len(plan.sequences):
            raise InternalError("a sequence is in one plan twice")
        super().submit(plan)

    def begin(self) -> None:
        """Compute the oldest step; `last_step_ms` says how long that takes."""
        if self._result is None:
            self._result = self._compute(self._plans[0])

    def collect(self) -> StepResult:
        self.begin()
        result, self._result = self._result, None
        if result is None:
            raise InternalError("no step is under way")
        return result

    def _compute(self, plan: StepPlan) -> StepResult:
        result = super().collect()
        if result.dropped:
            self.last_step_ms = 0.0
            return result
        if any(entry.start == 0 and entry.tokens[0] == POISON for entry in plan.sequences):
            raise DeviceLostError
        # Afterwards, since copies belong to the step; rows never write what a row before them reads.
        for entry in plan.sequences:
            tokens = self._tokens_of(entry.seq_id)
            if tokens is not None:
                self._runner.check(entry, tokens)
        self.last_step_ms = self.slowdown * planned_ms(self._step_time, plan)
        return msgspec.structs.replace(result, elapsed_ms=self.last_step_ms)


def planned_ms(step_time: StepCost, plan: StepPlan) -> float:
    """The time of the whole step by the cost model."""
    prefill_rows = prefill_context = num_decoding = decode_context = 0
    for entry in plan.sequences:
        rows = len(entry.tokens)
        if rows == 1 and entry.sample is not None:
            num_decoding += 1
            decode_context += entry.start + 1
        else:
            prefill_rows += rows
            prefill_context += attention_work(entry.start, rows)
    return step_time.step_ms(prefill_rows, prefill_context, num_decoding, decode_context)


@dataclass(slots=True)
class Device:
    """A core with its parts in reach."""

    core: EngineCore
    memory: PageManager
    executor: SimExecutor
    kv: list[TokenPages]
    card: ModelCard
    max_reqs: int


def build_device(
    clock: Clock,
    draws: Draws,
    *,
    num_pages: int,
    groups: tuple[KVGroup, ...] = (FULL,),
    config: SchedulerConfig | None = None,
    step_time: StepCost = SMOLLM2_ON_TWO_CORES,
    model_id: str = "simulated",
    numerics_class: str = NUMERICS_CLASS,
    max_model_len: int = MAX_MODEL_LEN,
    page_bytes: int = 0,
    exact: bool = True,
) -> Device:
    """A fresh engine core; `num_pages` per KV group. Not `exact`: only its times mean something."""
    config = config or SchedulerConfig()
    layout = KVLayout(groups=groups, dtype="float32")
    memory = PageManager(groups, [num_pages] * len(groups), enable_prefix_caching=True)
    scheduler = Scheduler(
        config,
        memory,
        create_order(config.scheduling_policy),
        numerics_class=numerics_class,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
    )
    runner = (SimRunner if exact else TimeRunner)(layout, num_pages, draws)

    def tokens_of(seq_id: int) -> Sequence[int] | None:
        seq = next(scheduler.flights).sequences.get(seq_id)
        return None if seq is None else seq.tokens

    lookahead = config.async_scheduling == "on"
    executor = SimExecutor(runner, step_time, tokens_of, lookahead=lookahead)
    card = ModelCard(
        model_id=model_id,
        aliases=(),
        architecture="null",
        weights_digest="simulated",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        head_width=VOCAB_SIZE,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        assets={name: hashlib.sha256(data).hexdigest() for name, data in TEXT_ASSETS.items()},
        kv_layout_digest=layout.digest(),
        numerics_class=numerics_class,
        deterministic=True,
        page_size=64,
        num_pages=num_pages * len(groups),
        page_bytes=page_bytes,
    )
    return Device(
        core=EngineCore(card, scheduler, memory, executor, clock),
        memory=memory,
        executor=executor,
        kv=runner.memory,
        card=card,
        max_reqs=config.max_num_seqs + config.max_num_queued_reqs,
    )
