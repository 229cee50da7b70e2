"""Drives a `ModelRunner` without a scheduler: rows in, every row's logits out. For tests only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from xllm.arch import ArchConfig
from xllm.engine.kernels.reference.torch_ops import TorchOps
from xllm.engine.model.layout import kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import load_weights
from xllm.engine.plan import PageCopy, SampleOp, SequencePlan, StepPlan
from xllm.engine.runner.runner import ModelRunner
from xllm.engine.sampling import Sampler
from xllm.errors import ConfigError
from xllm.types import PAGE_SIZE, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


class DictTensors:
    """A tensor source over arrays."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> Sequence[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise ConfigError(f"no tensor {name}")
        return self._tensors[name].shape

    def load_f32(self, name: str) -> np.ndarray:
        return self._tensors[name].astype(np.float32)

    def load_codes(self, name: str) -> None:
        return None


def make_runner(
    arch: ArchConfig, tensors, dtype: str = "float32", num_pages: int = 64, num_positions: int = 1024
) -> ModelRunner:
    ops = TorchOps(dtype)
    model = find_model(arch.name)
    weights = load_weights(model, arch, tensors, ops, num_positions)
    ops.probe([weights.layers[0][k] for k in ("qkv", "o", "gate_up", "down")] + [weights.top["head"]])
    layout = kv_layout(arch, dtype)
    return ModelRunner(model, arch, weights, ops, layout, [num_pages] * len(layout.groups), Sampler())


@dataclass
class Seq:
    """`pages[g]` as in a plan; `computed` rows have KV; `logits[p]` is the row of position p."""

    seq_id: int
    tokens: list[int]
    pages: list[list[int]]
    computed: int = 0
    logits: dict[int, np.ndarray] = field(default_factory=dict)

    def rows(self) -> np.ndarray:
        return np.stack([self.logits[p] for p in sorted(self.logits)])


class Driver:
    """Hands out pages in a shuffled order, so that nothing works by accident of their numbers."""

    def __init__(self, runner: ModelRunner, num_pages: int = 64, seed: int = 0) -> None:
        self.runner = runner
        self.groups = runner.kv_layout.groups
        order = np.random.default_rng(seed).permutation(num_pages)
        self._free = [[int(p) for p in order] for _ in self.groups]
        self._seqs: dict[int, Seq] = {}
        self._step = 0
        runner.logits_tap = self._tap

    def new(self, tokens: Sequence[int]) -> Seq:
        seq = Seq(len(self._seqs), list(tokens), [[] for _ in self.groups])
        self._seqs[seq.seq_id] = seq
        return seq

    def fork(self, parent: Seq, at: int) -> Seq:
        """A sequence with the parent's first `at` tokens: full pages shared, the partial one copied."""
        child = self.new(parent.tokens[:at])
        copies = []
        for g in range(len(self.groups)):
            child.pages[g] = parent.pages[g][: at // PAGE_SIZE]
            if at % PAGE_SIZE:
                child.pages[g].append(self._free[g].pop())
                copies.append(PageCopy(g, parent.pages[g][at // PAGE_SIZE], child.pages[g][-1]))
        child.computed = at
        self.runner.execute(StepPlan(step=self._step, sequences=(), copies=tuple(copies)))
        return child

    def free(self, seq: Seq) -> None:
        for g, pages in enumerate(seq.pages):
            self._free[g] += [p for p in pages if p >= 0]
        seq.pages = [[] for _ in self.groups]
        seq.computed = 0

    def step(self, *work: tuple[Seq, int], sample: bool = False) -> list[int]:
        """Compute the next `count` rows of each sequence; with `sample`, append the drawn token."""
        plans = [self._plan(seq, count, sample) for seq, count in work]
        result = self.runner.execute(StepPlan(step=self._step, sequences=tuple(plans)))
        self._step += 1
        drawn = []
        for (seq, count), part in zip(work, result.sequences, strict=True):
            if part.error is not None:
                raise part.error.to_error()
            seq.computed += count
            if part.choices:
                drawn.append(part.choices[0].tokens[0].token_id)
                seq.tokens.append(drawn[-1])
        return drawn

    def prefill(self, seq: Seq, chunk: int | None = None) -> Seq:
        """Compute all its rows in chunks."""
        while seq.computed < len(seq.tokens):
            left = len(seq.tokens) - seq.computed
            self.step((seq, min(left, chunk or left)))
        return seq

    def _plan(self, seq: Seq, count: int, sample: bool) -> SequencePlan:
        for g, group in enumerate(self.groups):
            while len(seq.pages[g]) * PAGE_SIZE < seq.computed + count:
                seq.pages[g].append(self._free[g].pop())
            if group.window is not None:
                self._give_back(seq, g, group.window)
        op = SampleOp(params=GREEDY, seed=0, choices=(0,), offset=0)
        return SequencePlan(
            seq_id=seq.seq_id,
            start=seq.computed,
            tokens=tuple(seq.tokens[seq.computed : seq.computed + count]),
            pages=tuple(tuple(p) for p in seq.pages),
            first_logit_row=0,
            sample=op if sample else None,
        )

    def _give_back(self, seq: Seq, g: int, window: int) -> None:
        for i in range(max(0, seq.computed - window + 1) // PAGE_SIZE):
            if seq.pages[g][i] >= 0:
                self._free[g].insert(0, seq.pages[g][i])
                seq.pages[g][i] = -1

    def _tap(self, seq_id: int, position: int, logits: np.ndarray) -> None:
        self._seqs[seq_id].logits[position] = logits
