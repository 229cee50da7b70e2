"""Contiguous KV memory on the native kernels: the same bits as through page tables, and what is refused."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.exactness import (  # noqa: F401  (pytest collects what is imported)
    NEIGHBOURS,
    TARGETS,
    Run,
    build_smollm2,
    mine,
    test_a_prefix_hit_changes_no_bit,
    test_preemption_and_recompute_change_no_bit,
)
from xllm.engine.build import BuiltEngine
from xllm.engine.kernels.native.library import find
from xllm.engine.kernels.native.programs import flatten
from xllm.engine.kernels.native.spaces import SpaceMapper
from xllm.engine.kvtransfer.memory import anonymous_pages
from xllm.engine.plan import SequencePlan
from xllm.errors import ConfigError

PATH, WHY = find()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no native kernels: {WHY}")


@pytest.fixture(scope="module")
def built(smollm2: str) -> BuiltEngine:
    made = build_smollm2(smollm2, platform="native", dtype="bfloat16", quantize="none", kv_memory="xtensor")
    assert any(line.startswith("kv_memory=xtensor") for line in made.report)
    return made


@pytest.fixture(scope="module")
def paged(smollm2: str) -> BuiltEngine:
    return build_smollm2(smollm2, platform="native", dtype="bfloat16", quantize="none")


@pytest.fixture(scope="module", params=["n=2"])
def case(request: pytest.FixtureRequest, built: BuiltEngine, paged: BuiltEngine):
    """The bits are those of an engine that looks every page up."""
    target = TARGETS[request.param]
    run = Run(paged, budget=1024)
    frames = run(target)
    mapper = built.memory.spaces.mapper
    before = mapper.counters
    yield target, run.rows, mine(frames)
    # Were nothing read through a space, nothing would have been tried.
    assert mapper.counters.num_read > before.num_read + 100
    assert mapper.counters.num_maps > before.num_maps
    assert mapper.counters.num_failed == 0


def region(
    num_pages: int = 6, page_bytes: int = 8192, groups: int = 1
) -> tuple[SpaceMapper, list[np.ndarray]]:
    shared = anonymous_pages("test")
    mapper = SpaceMapper(shared, groups, space_pages=4, max_num_seqs=2, max_mappings=100)
    return mapper, [mapper.memory(num_pages, page_bytes) for _ in range(groups)]


def seen(mapper: SpaceMapper, group: int, space: int, index: int) -> int:
    """The first byte of what stands there."""
    at = mapper._regions[group]
    page = at.num_pages + space * mapper.space_pages + index
    return ctypes.c_uint8.from_address(at.address + page * at.page_bytes).value


def test_a_space_shows_the_pages_of_the_pool() -> None:
    mapper, pools = region(groups=2)
    for g, pool in enumerate(pools):
        pool[:] = (10 * (g + 1) + np.arange(len(pool)))[:, None]
    for g in range(2):
        for index, page in enumerate((3, 0, 3)):
            mapper.map(1, g, index, page)
    mapper.wait()
    for g in range(2):
        assert [seen(mapper, g, 1, i) - 10 * (g + 1) for i in range(3)] == [3, 0, 3]
    pools[1][3] = 77
    assert seen(mapper, 1, 1, 0) == seen(mapper, 1, 1, 2) == 77
    mapper.map(1, 1, 0, 5)
    mapper.wait()
    assert seen(mapper, 1, 1, 0) == 25
    mapper.unmap(1)
    mapper.map(1, 0, 0, 2)
    mapper.wait()
    assert seen(mapper, 0, 1, 0) == 12
    assert mapper.counters.num_failed == 0


def entry(space: int, pages: tuple[int, ...], start: int = 0, rows: int = 1) -> SequencePlan:
    return SequencePlan(
        seq_id=1, start=start, tokens=(5,) * rows, pages=(pages,), first_logit_row=0, space=space
    )


def test_a_space_is_read_only_when_it_holds_the_very_pages_of_the_table() -> None:
    mapper, _ = region()
    assert mapper.space_of(entry(-1, (1, 2))) == -1
    assert mapper.space_of(entry(0, (1, 2))) == -1
    mapper.map(0, 0, 0, 1)
    mapper.map(0, 0, 1, 2)
    mapper.wait()
    assert mapper.space_of(entry(0, (1, 2))) == 0
    assert mapper.space_of(entry(0, (1, 3))) == -1
    assert mapper.space_of(entry(0, (1, 2, 3))) == -1
    assert mapper.space_of(entry(0, (-1, 2))) == 0
    mapper.map(0, 0, 0, 4)
    mapper.wait()
    assert mapper.space_of(entry(0, (1, 2))) == -1
    assert mapper.space_of(entry(0, (-1, 2))) == 0
    mapper.unmap(0)
    assert mapper.space_of(entry(0, (-1, 2))) == -1
    assert mapper.counters.num_late == mapper.counters.num_late_decodes == 5


def test_a_page_that_the_system_cannot_map_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        region(page_bytes=5000)


def test_steps_outside_a_space_are_refused(built: BuiltEngine) -> None:
    programs = built.runner.programs
    mapper = built.memory.spaces.mapper

    def set_step(space: int, held: int, freed: int, start: int = 0) -> int:
        words, _, _ = flatten([entry(-1, tuple(range(held)), start)], 1)
        words[3] = space
        del words[6:]
        words.append(freed)
        address, count = words.buffer_info()
        return programs.library.xn_step_set(programs._step, address, count, 1)

    assert set_step(0, 1, 0) == 0
    assert set_step(mapper.num_spaces - 1, mapper.space_pages, 0) == 0
    assert set_step(mapper.num_spaces, 1, 0) != 0
    assert set_step(-2, 1, 0) != 0
    assert set_step(0, mapper.space_pages + 1, 0) != 0
    assert set_step(0, 1, 0, start=64) != 0  # its page is not held
    assert set_step(0, 2, 1, start=64) != 0  # the row sees a page that was given back
    assert set_step(0, 2, -1, start=64) != 0
    assert set_step(0, 2, 3, start=64) != 0
    assert set_step(0, 2, 0, start=64) == 0


def test_mappings_left_from_others_change_no_bit(built: BuiltEngine, case) -> None:
    """Spaces are handed on while most of what stands in them is another's."""
    target, rows, tokens = case
    run = Run(built, budget=256, caching=True)
    run(*NEIGHBOURS[:4])
    assert mine(run(*NEIGHBOURS[4:7], target)) == tokens
    assert run.memory.spaces.counters.num_kept > 0
    assert run.rows == rows
