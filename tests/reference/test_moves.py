"""The reference platform: a sequence that moves between engines goes on with the same bits."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the reference platform needs torch")

from tests.moving import make_engines, moved, unmoved
from tests.reference.test_bitwise import ARCHS
from xllm.engine.platform.cpu import PLATFORM
from xllm.testing.null_engine import spec

PROMPT = tuple(range(3, 133))


@pytest.mark.parametrize(("arch", "mode"), [("llama", "push"), ("gemma3", "pull")])
def test_a_move_changes_no_bit(arch: str, mode: str) -> None:
    engines, events = make_engines(PLATFORM, ARCHS[arch], (1, 1), transfer="tcp", budget=64, caching=False)
    try:
        of = spec("target", PROMPT, max_tokens=40, ignore_eos=True, temperature=0.9, seed=3, n=2)
        rows, tokens = unmoved(engines[0], of)
        got, got_tokens, answers = moved(engines, events, of, [0, 7], mode)
        assert len(answers) == 2
        assert [e.core.mover.counters.num_in for e in engines] == [1, 1]
        assert (got, got_tokens) == (rows, tokens)
    finally:
        for engine in engines:
            engine.plane.close()
