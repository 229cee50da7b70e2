"""What a platform offers the engine, and what a runner offers the executor.

Contracts only. A platform outside the tree implements `Platform` and names an instance of it in the
entry-point group `xllm.platforms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from xllm.arch import ArchConfig
from xllm.codes import GroupCodes
from xllm.config.schema import EngineConfig
from xllm.engine.fitting import MemoryPlan
from xllm.engine.kernels.programs import ProgramCounters
from xllm.engine.kvtransfer.memory import KVMemory
from xllm.engine.memory.spaces import Mapper
from xllm.engine.plan import StepPlan, StepResult
from xllm.engine.sampling import Sampler
from xllm.engine.surviving import SharedPages
from xllm.types import KVLayout


class TensorSource(Protocol):
    """The weights under their Hugging Face names; `xllm.artifacts` makes one."""

    def identity(self) -> str:
        """Names these very bytes on this machine; "" when nothing vouches for them."""

    def release(self) -> None:
        """Give back the memory that reading took; reading again is allowed."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load_f32(self, name: str) -> npt.NDArray[np.float32]: ...

    def load_codes(self, name: str) -> GroupCodes | None: ...

    def code_kind(self, name: str) -> tuple[int, int] | None: ...


class Runner(Protocol):
    """A loaded model that runs steps. Owned by the step thread."""

    @property
    def kv_layout(self) -> KVLayout: ...

    @property
    def deterministic(self) -> bool:
        """Whether equal requests get equal bits whatever their company: measured, not assumed."""

    @property
    def numerics(self) -> tuple[str, ...]:
        """The platform's part of the numerics class: everything of it that may change a bit of the
        logits (kernels and version, dtype, ISA), and nothing else (no thread counts)."""

    @property
    def program_counters(self) -> ProgramCounters | None:
        """What was recorded and replayed so far; None where every step is run op by op."""

    @property
    def finished_layers(self) -> int:
        """Of the step that runs; 0 where nobody counts. Another thread asks, so cheap and without locks."""

    @property
    def num_forwards(self) -> int:
        """Forward passes so far; 0 where nobody counts."""

    def forget_layers(self) -> None:
        """Between two steps: `finished_layers` is 0 until the next one has finished a layer."""

    def kv_memory(self, shared: SharedPages | None = None) -> KVMemory | None:
        """The KV pages as bytes, for transfers; None where the host cannot touch them. `shared`: what they
        lie in, if the platform was told to use it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the step. A failure in one sequence's sampling is that sequence's `error`; running a
        plan or a part of it again is harmless."""

    def close(self) -> None:
        """Give back device memory; idempotent."""


@runtime_checkable
class StepQueue(Protocol):
    """What a runner may offer beyond `execute`: the next step is handed over while one runs, and begins when
    that one ends without waiting for anybody. At most two are under way."""

    def submit(self, plan: StepPlan) -> None:
        """As `Executor.submit`. Page copies of the plan come before its rows."""

    def collect(self) -> StepResult:
        """As `Runner.execute`, of the oldest plan under way. When it raises what the forward pass raises, the
        plan behind it is not run: its `collect` gives a dropped result."""


@runtime_checkable
class TellsLayers(Protocol):
    """What a runner may offer beyond `execute`: when the layers of a step ended."""

    def trace_layers(self, on: bool) -> None:
        """Between two steps."""

    def layer_stamps(self) -> tuple[int, ...]:
        """Of the last step collected: when it began and when each layer was complete, in ns of the monotonic
        clock; () where nobody told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRunner:
    """`num_pages` per KV group; `report` holds one line per choice, with its reason. `mapper` where the
    runner can read a sequence's pages in one piece."""

    runner: Runner
    num_pages: tuple[int, ...]
    report: tuple[str, ...]
    mapper: Mapper | None = None


class Platform(Protocol):
    """`KeepsPages` and `PlansMemory` are what a platform may offer beyond this."""

    @property
    def name(self) -> str: ...

    def why_not(self, config: EngineConfig, arch: ArchConfig) -> tuple[str, ...]:
        """Reasons why this platform cannot run the model as configured; empty = it can."""

    def create_runner(
        self,
        arch: ArchConfig,
        tensors: TensorSource,
        config: EngineConfig,
        max_model_len: int,
        sampler: Sampler,
    ) -> BuiltRunner:
        """Load the weights and reserve the KV pages. Raises ConfigError with field, value and remedy."""


@runtime_checkable
class PlansMemory(Protocol):
    """A platform that knows before loading what it will take; `create_runner` begins with the same plan."""

    def plan_memory(
        self, arch: ArchConfig, tensors: TensorSource, config: EngineConfig, max_model_len: int
    ) -> MemoryPlan:
        """Reads no weight. Raises ConfigError with the table and what would fit."""


@runtime_checkable
class KeepsPages(Protocol):
    """A platform whose KV pages can lie in memory that outlives the process."""

    def over(self, shared: SharedPages) -> Platform:
        """The same platform; its runner takes `shared.next_group` for each KV group, in order."""
