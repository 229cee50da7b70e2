"""A device that computes nothing and yet depends on everything: logits are a hash of the KV it reads.

Its "KV" is the token ids themselves, kept in pages as a real device keeps keys and values. A wrong
page table, a lost copy or a stale page changes the tokens, so policy errors show without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from xllm.engine.kvtransfer.memory import KVMemory, inseparable
from xllm.engine.plan import SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.platform.null_mapper import NullMapper
from xllm.engine.sampling import Sampler
from xllm.engine.surviving import SharedPages
from xllm.errors import InternalError, XllmError
from xllm.types import PAGE_SIZE, KVLayout, TokenLogprobs

TokenPages = npt.NDArray[np.int32]

NEVER_WRITTEN = -1
"""Stale content must never be read, so it is recognisable."""

Fault = Callable[[SequencePlan], None]
"""Called for each sequence before it is computed; raises to inject a failure."""


def token_pages(shared: SharedPages, num_pages: Sequence[int]) -> list[TokenPages]:
    """KV in memory that outlives the process: what an earlier engine left, else nothing."""
    kv = [shared.next_group(n, PAGE_SIZE * 4).view(np.int32) for n in num_pages]
    if shared.found is None:
        for pages in kv:
            pages.fill(NEVER_WRITTEN)
    return kv


def empty_pages(num_pages: Sequence[int]) -> list[TokenPages]:
    """KV in memory of the process's own."""
    return [np.full((n, PAGE_SIZE), NEVER_WRITTEN, dtype=np.int32) for n in num_pages]


class NullRunner:
    """Same contract as a model's runner; `vocab_size` logits per row."""

    deterministic = True
    numerics = ("null",)
    program_counters = None
    finished_layers = 0
    num_forwards = 0

    def __init__(
        self,
        layout: KVLayout,
        num_pages: Sequence[int],
        vocab_size: int,
        sampler: Sampler,
        fault: Fault | None = None,
        kv: list[TokenPages] | None = None,
        spaces: NullMapper | None = None,
    ) -> None:
        """`kv` (page, token) per group, where it is to lie elsewhere than in memory of our own. With `spaces`
        KV is read and written through them where a plan has one."""
        self.kv_layout = layout
        self._windows = [g.window for g in layout.groups]
        self._kv = kv or empty_pages(num_pages)
        self.spaces = spaces
        self._vocab_size = vocab_size
        self._sampler = sampler
        self.fault = fault

    def execute(self, plan: StepPlan) -> StepResult:
        if self.spaces is not None:
            self.spaces.work()
        for copy in plan.copies:
            self._kv[copy.group][copy.dst] = self._kv[copy.group][copy.src]
        return StepResult(step=plan.step, sequences=tuple(self._sequence(s) for s in plan.sequences))

    def forget_layers(self) -> None:
        """Nobody counts them."""

    def kv_memory(self, shared: SharedPages | None = None) -> KVMemory:
        """A page is its token ids: one that came from elsewhere, or not, shows in what is drawn."""
        return inseparable([pages.view(np.uint8).reshape(len(pages), -1) for pages in self._kv], shared)

    def close(self) -> None:
        return

    def _sequence(self, entry: SequencePlan) -> SequenceResult:
        if self.fault is not None:
            self.fault(entry)
        if self.spaces is not None:
            entry = msgspec.structs.replace(entry, pages=self.spaces.pages_of(entry))
        self._write(entry)
        rows = range(entry.first_logit_row, len(entry.tokens))
        if not rows:
            return SequenceResult(seq_id=entry.seq_id)
        logits = np.stack([self._logits(entry, entry.start + row) for row in rows])
        kept: tuple[TokenLogprobs, ...] = ()
        if entry.prompt_logprobs is not None:
            targets = entry.prompt_targets
            kept = self._sampler.prompt_logprobs(logits[: len(targets)], targets, entry.prompt_logprobs)
        if entry.sample is None:
            return SequenceResult(seq_id=entry.seq_id, prompt_logprobs=kept)
        try:
            choices = self._sampler.sample(logits[-1], entry.sample)
        except XllmError as error:
            return SequenceResult(seq_id=entry.seq_id, error=error.info())
        return SequenceResult(seq_id=entry.seq_id, choices=choices, prompt_logprobs=kept)

    def _write(self, entry: SequencePlan) -> None:
        for kv, pages in zip(self._kv, entry.pages, strict=True):
            for row, token in enumerate(entry.tokens):
                page, slot = divmod(entry.start + row, PAGE_SIZE)
                kv[pages[page], slot] = token

    def _logits(self, entry: SequencePlan, position: int) -> np.ndarray:
        seen = [self._visible(g, entry, position) for g in range(len(self._kv))]
        key = xxhash.xxh3_64_intdigest(b"|".join(s.tobytes() for s in seen))
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(self._vocab_size, np.float32)

    def _visible(self, g: int, entry: SequencePlan, position: int) -> np.ndarray:
        """Token ids that the row at `position` attends to in group g."""
        window = self._windows[g]
        first = 0 if window is None else max(0, position - window + 1)
        needed = entry.pages[g][first // PAGE_SIZE : position // PAGE_SIZE + 1]
        if min(needed) < 0:
            raise InternalError("a row would read a page that was given back")
        tokens = self._kv[g][list(needed)].reshape(-1)
        offset = first - first // PAGE_SIZE * PAGE_SIZE
        tokens = tokens[offset : offset + position - first + 1]
        if tokens.min() < 0:
            raise InternalError("a row would read KV that was never written")
        return tokens
