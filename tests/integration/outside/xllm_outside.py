"""What another package may bring: one of each thing that xLLM finds by entry point."""

from __future__ import annotations

import numpy as np

from xllm.engine.model import llama
from xllm.engine.model.definition import ModelDefinition
from xllm.engine.platform.null import NullPlatform
from xllm.service.router.base import Placement

MODEL = ModelDefinition(
    parameters=llama.parameters, ropes=llama.DEFINITION.ropes, forward=llama.forward, head=llama.head
)


class _Outside(NullPlatform):
    name = "outside"


OutsidePlatform = _Outside()


def last(view, snapshot, config):
    return Placement(instance=snapshot.instances[-1].name, reasons=("the last one",))


class OnlyToken:
    name = "outside-only"

    def __call__(self, logits: np.ndarray, op) -> None:
        logits[np.arange(logits.size) != 77] = -np.inf


class ShortestFirst:
    def key(self, spec, arrival: int) -> tuple[float, ...]:
        return (len(spec.prompt_token_ids), arrival)

    def may_displace(self, newcomer, running) -> bool:
        return False
