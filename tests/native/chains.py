"""Chains of plans over a runner, executed one by one or handed over while one runs. For tests only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xllm.engine.plan import PENDING, PageCopy, SampleOp, SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.runner.queued import QueuedRunner
from xllm.engine.sampling import needs_history
from xllm.errors import ErrorInfo
from xllm.types import PAGE_SIZE, SamplingParams, TokenLogprobs

EOS = 3


@dataclass(kw_only=True)
class Line:
    """A sequence: `planned` rows of it are in plans; `awaits` so many tokens of plans under way."""

    seq_id: int
    prompt: list[int]
    params: SamplingParams
    num_tokens: int
    chunk: int
    choices: tuple[int, ...]
    tokens: list[int]
    pages: list[list[int]]
    planned: int = 0
    num_drawn: int = 0
    awaits: int = 0
    error: ErrorInfo | None = None
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


class Chain:
    """Everything a scheduler would decide, decided at once: all lines go on as far as they can in each plan."""

    def __init__(self, runner: QueuedRunner, num_pages: int, tapped: bool = True) -> None:
        self.runner = runner
        self.groups = runner.kv_layout.groups
        self._free = [[int(p) for p in np.random.default_rng(0).permutation(num_pages)] for _ in self.groups]
        self._step = 0
        self._copies: list[PageCopy] = []
        self.lines: list[Line] = []
        self.rows: dict[tuple[int, int], bytes] = {}
        self.results: list[StepResult] = []
        self.num_pending = 0
        runner.logits_tap = self._tap if tapped else None

    def add(self, prompt: Sequence[int], params: SamplingParams, num_tokens: int, chunk: int = 1000) -> Line:
        line = Line(
            seq_id=len(self.lines),
            prompt=list(prompt),
            params=params,
            num_tokens=num_tokens,
            chunk=chunk,
            choices=tuple(range(params.n)),
            tokens=list(prompt),
            pages=[[] for _ in self.groups],
        )
        self.lines.append(line)
        return line

    def plan(self) -> StepPlan | None:
        sequences = [s for line in self.lines if (s := self._next(line)) is not None]
        if not sequences:
            return None
        copies, self._copies = tuple(self._copies), []
        self._step += 1
        self.num_pending += sum(s.pending for s in sequences)
        return StepPlan(step=self._step, sequences=tuple(sequences), copies=copies)

    def execute(self) -> Chain:
        while (plan := self.plan()) is not None:
            self.absorb(plan, self.runner.execute(plan))
        return self

    def queue(self) -> Chain:
        """The next plan is always submitted before the one that runs is collected, where there is one."""
        under_way: list[StepPlan] = []
        while (plan := self.plan()) is not None or under_way:
            if plan is not None:
                self.runner.submit(plan)
                under_way.append(plan)
                if len(under_way) == 1:
                    continue
            self.absorb(under_way.pop(0), self.runner.collect())
        return self

    def absorb(self, plan: StepPlan, result: StepResult) -> None:
        self.results.append(result)
        assert [s.seq_id for s in plan.sequences] == [s.seq_id for s in result.sequences]
        for entry, part in zip(plan.sequences, result.sequences, strict=True):
            self._absorb(self.lines[entry.seq_id], entry, part)

    def pages_of(self, line: Line) -> np.ndarray:
        pools = [g.array for g in self.runner._kv.groups]
        return np.concatenate([p[pages].reshape(-1) for p, pages in zip(pools, line.pages, strict=True)])

    def _absorb(self, line: Line, entry: SequencePlan, part: SequenceResult) -> None:
        line.prompt_logprobs += part.prompt_logprobs
        if line.error is not None:
            return
        line.error = part.error
        if entry.sample is None or line.error is not None:
            return
        line.awaits -= 1
        for choice in part.choices[1:]:
            self._fork(line, choice.choice, choice.tokens[0].token_id)
        line.tokens.append(part.choices[0].tokens[0].token_id)
        line.logprobs.append(part.choices[0].tokens[0].logprobs)
        line.choices = line.choices[:1]

    def _fork(self, line: Line, choice: int, token: int) -> None:
        child = self.add(line.prompt, line.params, line.num_tokens)
        child.tokens, child.choices = [*line.tokens, token], (choice,)
        child.planned, child.num_drawn = line.planned, 1
        for g, pages in enumerate(line.pages):
            full = line.planned // PAGE_SIZE
            child.pages[g] = pages[:full]
            if line.planned % PAGE_SIZE:
                child.pages[g].append(self._free[g].pop())
                self._copies.append(PageCopy(g, pages[full], child.pages[g][-1]))

    def _next(self, line: Line) -> SequencePlan | None:
        if line.error is not None or line.num_drawn >= line.num_tokens:
            return None
        pending = line.planned == len(line.tokens)
        if pending and (not line.awaits or len(line.choices) > 1):
            return None
        rows = (PENDING,) if pending else tuple(line.tokens[line.planned :][: line.chunk])
        samples = line.planned + len(rows) == len(line.tokens) + pending
        scores = line.params.prompt_logprobs is not None and line.planned < len(line.prompt)
        entry = SequencePlan(
            seq_id=line.seq_id,
            start=line.planned,
            tokens=rows,
            pages=self._pages(line, line.planned + len(rows)),
            first_logit_row=0 if scores else len(rows) - samples,
            sample=self._op(line) if samples else None,
            prompt_logprobs=line.params.prompt_logprobs if scores else None,
            prompt_targets=tuple(line.prompt[line.planned + 1 :][: len(rows)]) if scores else (),
            pending=pending,
        )
        line.planned += len(rows)
        if samples:
            line.awaits += 1
            line.num_drawn += 1
        return entry

    def _op(self, line: Line) -> SampleOp:
        history = needs_history(line.params)
        return SampleOp(
            params=line.params,
            seed=line.params.seed or 0,
            choices=line.choices,
            offset=line.num_drawn,
            banned=(EOS,) if line.num_drawn < line.params.min_tokens else (),
            prompt=tuple(line.prompt) if history else (),
            output=tuple(line.output) if history else (),
        )

    def _pages(self, line: Line, end: int) -> tuple[tuple[int, ...], ...]:
        for g, group in enumerate(self.groups):
            while len(line.pages[g]) * PAGE_SIZE < end:
                line.pages[g].append(self._free[g].pop())
            if group.window is not None:
                for i in range(max(0, line.planned - group.window + 1) // PAGE_SIZE):
                    if line.pages[g][i] >= 0:
                        self._free[g].insert(0, line.pages[g][i])
                        line.pages[g][i] = -1
        return tuple(tuple(p) for p in line.pages)

    def _tap(self, seq_id: int, position: int, logits: np.ndarray) -> None:
        self.rows[seq_id, position] = logits.tobytes()
