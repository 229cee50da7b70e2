"""Native kernels: a sequence that moves between engines goes on with the same bits, over every transport."""

from __future__ import annotations

import numpy as np
import pytest

from tests.moving import make_engines, moved, unmoved
from tests.native.native_driver import library
from tests.reference.test_bitwise import ARCHS
from xllm.engine.platform.native import PLATFORM
from xllm.testing.null_engine import spec

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")

PROMPT = tuple(int(t) for t in np.random.default_rng(3).integers(3, 500, 150))
KINDS = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 4, "logprobs": 2},
    "two": {"temperature": 1.0, "n": 2},
}
CASES = [
    # arch, transport, mode, budget, caching, kind
    ("llama", "shm", "push", 512, True, "greedy"),
    ("llama", "tcp", "push", 512, False, "seeded"),
    ("llama", "shm", "pull", 512, True, "two"),
    ("llama", "tcp", "pull", 64, False, "greedy"),
    ("llama", "shm", "push", 64, False, "two"),
    ("gemma3", "shm", "push", 64, True, "seeded"),
    ("gemma3", "tcp", "pull", 512, False, "two"),
    ("gemma3", "tcp", "push", 40, True, "greedy"),
    ("gemma3", "shm", "push", 64, True, "two xtensor"),
]


@pytest.mark.parametrize(("arch", "transfer", "mode", "budget", "caching", "kind"), CASES)
def test_a_move_changes_no_bit(arch, transfer, mode, budget, caching, kind) -> None:
    kind, _, kv_memory = kind.partition(" ")
    engines, events = make_engines(
        PLATFORM,
        ARCHS[arch],
        (1, 2),
        transfer=transfer,
        budget=budget,
        caching=caching,
        kv_memory=kv_memory or "paged",
    )
    try:
        of = spec("target", PROMPT, max_tokens=60, ignore_eos=True, **KINDS[kind])
        rows, tokens = unmoved(engines[0], of)
        assert len(rows) >= 60
        # During the prefill, then twice while it decodes.
        got, got_tokens, answers = moved(engines, events, of, [0, 9, 25], mode)
        assert len(answers) == 3
        assert got_tokens == tokens
        assert got == rows
        for engine in engines:
            engine.step()
            counts = engine.memory.counts()
            assert (counts.owned, counts.in_transfer) == (0, 0)
        if kv_memory:
            assert all(e.memory.spaces.mapper.counters.num_read > 20 for e in engines)
        assert [e.core.mover.counters.num_in for e in engines] == [1, 2]
        # Nothing was computed twice but the one row that each arrival needs anyway.
        assert sum(e.core.snapshot().prompt_tokens for e in engines) == 2 * len(PROMPT)
    finally:
        for engine in engines:
            engine.plane.close()
