"""Moved sequences against unmoved ones, bit by bit, in every combination: `make exactness-moves` (minutes).

A cell is one request, moved once in its prompt and twice while it decodes. The quick part of it stands in the
native and reference stages; whole processes over HTTP in `tests/integration/handover`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from tests.moving import Engine, Events, make_engines, moved, unmoved
from tests.native.native_driver import library
from tests.reference.test_bitwise import ARCHS
from xllm.engine.kvtransfer.mooncake import why_not
from xllm.engine.platform.native import PLATFORM
from xllm.testing.null_engine import spec

pytestmark = [
    pytest.mark.robustness,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(library() is None, reason="the native kernels are not built here"),
]

PROMPT = tuple(int(t) for t in np.random.default_rng(3).integers(3, 500, 150))
KINDS = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 4},
    "logprobs": {"temperature": 0.8, "seed": 5, "logprobs": 2},
    "two": {"temperature": 1.0, "n": 2},
}
THREADS = {"1P+1D": (1, 1), "1P+1D, threads 1 and 2": (1, 2), "2P+2D": (1, 2, 1, 2)}
"""In a ring: of four engines each has the request once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a set of engines is made for; all modes and kinds of requests run on one."""

    arch: str
    transfer: str
    budget: int
    caching: bool
    engines: str

    def __str__(self) -> str:
        chunked = "chunked" if self.budget < len(PROMPT) else "whole"
        cache = "cache" if self.caching else "no cache"
        return f"{self.arch} {self.transfer} {chunked} {cache} {self.engines}"


SETTINGS = [
    Setting(arch=arch, transfer=transfer, budget=budget, caching=caching, engines=engines)
    for transfer, arch, budget, caching, engines in product(
        ("shm", "tcp", "mooncake"), ("llama", "gemma3"), (512, 64), (True, False), THREADS
    )
]


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def made(request: pytest.FixtureRequest) -> Iterator[tuple[list[Engine], Events]]:
    setting: Setting = request.param
    if setting.transfer == "mooncake" and (reason := why_not()) is not None:
        pytest.skip(reason)
    engines, events = make_engines(
        PLATFORM,
        ARCHS[setting.arch],
        THREADS[setting.engines],
        transfer=setting.transfer,
        budget=setting.budget,
        caching=setting.caching,
    )
    yield engines, events
    for engine in engines:
        engine.plane.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["push", "pull"])
def test_moves_change_no_bit(made: tuple[list[Engine], Events], mode: str, kind: str) -> None:
    engines, events = made
    name = f"{mode}-{kind}"
    of = spec(name, PROMPT, max_tokens=60, ignore_eos=True, cache_salt=name, **KINDS[kind])
    rows, tokens = unmoved(engines[0], of)
    assert len(rows) >= 60
    num_in = [e.core.mover.counters.num_in for e in engines]
    got, got_tokens, answers = moved(engines, events, of, [0, 9, 25], mode)
    assert len(answers) == 3
    arrived = [e.core.mover.counters.num_in - n for e, n in zip(engines, num_in, strict=True)]
    assert arrived == ([0, 1, 1, 1] if len(engines) == 4 else [1, 2])
    assert (got_tokens, got) == (tokens, rows)
    for engine in engines:
        engine.step()
        counts = engine.memory.counts()
        assert (counts.owned, counts.in_transfer) == (0, 0)
