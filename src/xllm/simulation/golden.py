"""The right answer to a request: the same request alone on a fresh engine, without faults.

Engine core and journal only: no front, no event loop, no other request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from xllm.config import SchedulerConfig
from xllm.service.choice_text import choice_text
from xllm.service.journal import RequestJournal
from xllm.service.stream import Delta
from xllm.simulation.device import MAX_MODEL_LEN, TEXT_ASSETS, VOCAB_SIZE, Device, Draws, build_device
from xllm.testing.clock import FakeClock
from xllm.text.assets import TextAssets
from xllm.types import KVGroup, RequestSpec, TokenLogprobs

TEXT = TextAssets.from_card_assets(TEXT_ASSETS)


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """Everything that a client gets of one choice."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """`num_ends` counts deltas with a finish reason, per choice."""

    choices: tuple[ChoiceOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    num_ends: tuple[int, ...]


def joined(deltas: Iterable[Delta], num_choices: int) -> Output:
    """The deltas of a request put together, in the order they came."""
    of: list[list[Delta]] = [[] for _ in range(num_choices)]
    for delta in deltas:
        of[delta.choice].append(delta)
    prompt = [d.prompt_logprobs for group in of for d in group if d.prompt_logprobs is not None]
    return Output(
        choices=tuple(_choice(group) for group in of),
        prompt_logprobs=tuple(t for part in prompt for t in part) if prompt else None,
        num_ends=tuple(sum(d.finish_reason is not None for d in group) for group in of),
    )


def _choice(deltas: list[Delta]) -> ChoiceOutput:
    last = deltas[-1] if deltas else None
    return ChoiceOutput(
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        text="".join(d.text for d in deltas),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
        finish_reason=last.finish_reason if last else None,
        stop_reason=last.stop_reason if last else None,
    )


def golden_output(spec: RequestSpec, groups: tuple[KVGroup, ...], draws: Draws) -> Output:
    """What `spec`'s first attempt gives when nothing disturbs it."""
    num_pages = spec.params.n * (MAX_MODEL_LEN // 64 + 1)
    device = build_device(
        FakeClock(), draws, num_pages=num_pages, groups=groups, config=SchedulerConfig(max_num_seqs=64)
    )
    alone = msgspec.structs.replace(spec, attempt=0, emitted=(), ended=(), deadline_ms=None)
    return joined(_run(device, alone), spec.params.n)


def _run(device: Device, spec: RequestSpec) -> list[Delta]:
    journal = RequestJournal(spec, head_width=VOCAB_SIZE, make_text=lambda: choice_text(TEXT, spec.params))
    device.core.submit(spec)
    deltas: list[Delta] = []
    while not journal.ended:
        _, frames = device.core.step()
        for frame in frames:
            delta = journal.absorb(frame)
            if delta is not None:
                deltas.append(delta)
            device.core.scheduler.committed(frame.request_id, frame.choice, frame.offset + len(frame.tokens))
    return deltas
