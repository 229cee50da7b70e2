"""The exactness suite on the native platform, for every weight class."""

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
from xllm.engine.kernels.native.library import find

PATH, WHY = find()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no native kernels: {WHY}")


@pytest.fixture(scope="module", params=["none", "file", "w8g32", "w4g32", "w8a8"])
def built(smollm2: str, request: pytest.FixtureRequest) -> BuiltEngine:
    made = build_smollm2(smollm2, platform="native", dtype="bfloat16", quantize=request.param)
    assert made.runner.program_counters is not None
    return made
