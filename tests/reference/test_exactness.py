"""The exactness suite on the reference platform, float32."""

from __future__ import annotations

import pytest

from tests.exactness import (  # noqa: F401  (pytest collects what is imported)
    build_smollm2,
    case,
    test_a_prefix_hit_changes_no_bit,
    test_chunk_borders_change_no_bit,
    test_planning_ahead_changes_no_bit,
    test_preemption_and_recompute_change_no_bit,
    test_resume_on_a_fresh_engine_changes_no_bit,
    test_sixteen_neighbours_change_no_bit,
)
from xllm.engine.build import BuiltEngine

pytest.importorskip("torch", reason="the reference platform needs torch")


@pytest.fixture(scope="module")
def built(smollm2: str) -> BuiltEngine:
    return build_smollm2(smollm2, platform="cpu", dtype="float32")
