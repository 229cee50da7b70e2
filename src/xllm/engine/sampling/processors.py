"""Logits processors: code from outside the tree that changes logits, found by entry point.

They run after logit_bias and before the masks, so none can bring a forbidden token back. Only names
given in the configuration are loaded; nothing here comes from a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from xllm.engine.plan import SampleOp
from xllm.engine.sampling.arrays import F32
from xllm.errors import ConfigError

GROUP = "xllm.logits_processors"


@runtime_checkable
class LogitsProcessor(Protocol):
    """Changes one row of logits in place.

    Must be a function of its two arguments alone (the same row must give the same token whenever it
    is computed again) and must not keep `logits`. It may read `op.params.extra_args`;
    `op.prompt`/`op.output` are filled only where `needs_history(op.params)`. An exception ends the
    request it was called for.
    """

    name: str

    def __call__(self, logits: F32, op: SampleOp) -> None:
        """`logits`: float32 (V,), writeable, after logit_bias; leave it free of NaN and +inf."""


def load_processors(names: Sequence[str]) -> tuple[LogitsProcessor, ...]:
    """Load entry points of `xllm.logits_processors` by name, in order; each is a factory without arguments.

    Raises ConfigError for an unknown name (it lists the known ones) or an object that is no processor.
    """
    known = {point.name: point for point in entry_points(group=GROUP)}
    loaded: list[LogitsProcessor] = []
    for name in names:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none is installed"
            raise ConfigError(f"logits_processors: no processor is called {name!r}; known: {listed}.")
        processor = known[name].load()()
        if not (isinstance(processor, LogitsProcessor) and callable(processor)):
            raise ConfigError(
                f"logits_processors: the entry point {name!r} does not make a LogitsProcessor "
                "(an attribute `name` and __call__(logits, op))."
            )
        loaded.append(processor)
    return tuple(loaded)
