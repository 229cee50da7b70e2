"""Contiguous KV memory: random schedules give what paged ones give, and nothing is lost; shown to bite."""

from __future__ import annotations

import random

import pytest

from xllm.config import SchedulerConfig
from xllm.engine.memory.manager import PageManager
from xllm.engine.memory.spaces import UNMAPPED, Spaces
from xllm.engine.platform.null_mapper import NullMapper
from xllm.errors import InternalError
from xllm.testing.null_engine import FULL, WINDOW, NullEngine, null_engine, outputs, spec
from xllm.types import KVGroup

ROOT = b"root"
GROUPS = {"full": (FULL,), "window": (FULL, WINDOW)}


def load(rng: random.Random, count: int) -> list:
    """Prompts that share prefixes, some with two answers."""
    heads = [[rng.randrange(3, 500) for _ in range(150)] for _ in range(3)]
    made = []
    for i in range(count):
        head = rng.choice(heads)[: rng.choice((0, 64, 130, 150))]
        tail = [rng.randrange(3, 500) for _ in range(rng.randrange(1, 250))]
        fields = {"n": 2, "temperature": 1.0} if rng.random() < 0.2 else {}
        made.append(
            spec(f"r{i}", (*head, *tail), max_tokens=rng.randrange(1, 120), ignore_eos=True, seed=i, **fields)
        )
    return made


def play(engine: NullEngine, rng: random.Random, requests: list) -> dict[tuple[str, int], tuple[int, ...]]:
    """Whatever happens to the requests, it is drawn; the tokens must not depend on it."""
    frames, waiting = [], list(requests)
    for _ in range(20_000):
        if waiting and rng.random() < 0.3:
            engine.core.submit(waiting.pop(0))
        if rng.random() < 0.03:
            engine.core.scheduler.preempt_all()
        if rng.random() < 0.01:
            engine.memory.reset_prefix_cache()
        frames += engine.step()
        same_as_tables(engine)
        if not waiting and not engine.core.has_requests:
            engine.memory.check_idle()
            return outputs(frames)
    raise AssertionError("the requests did not end")


def same_as_tables(engine: NullEngine) -> None:
    """No two tables have one space, and each finds its own pages there."""
    spaces = engine.memory.spaces
    if spaces is None:
        return
    books = engine.core.scheduler._books
    tables = [s.table for s in (*books.running, *books.waiting) if s.table is not None]
    used = [t.space for t in tables if t.space >= 0]
    assert len(set(used)) == len(used) == spaces.num_in_use
    assert all(spaces.is_there(t.space, t.pages) for t in tables if t.space >= 0)
    spaces.check()


def engine_with(groups: str, mapper: type[NullMapper] | None, seed: int, **more) -> NullEngine:
    of = GROUPS[groups]
    pace_rng = random.Random(seed)
    spaces = None
    if mapper is not None:
        # Few spaces and mappings, so that sequences go without and idle ones are unmapped.
        spaces = mapper(
            len(of),
            more.pop("num_spaces", 12),
            32,
            more.pop("max_mappings", 90),
            lambda: pace_rng.randrange(9),
        )
    config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=96)
    return null_engine(num_pages=26, groups=of, config=config, spaces=spaces)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("groups", list(GROUPS))
def test_random_schedules_give_the_same_tokens_as_paged(groups: str, seed: int) -> None:
    requests = load(random.Random(seed), 14)
    expected = play(engine_with(groups, None, seed), random.Random(seed + 100), requests)
    engine = engine_with(groups, NullMapper, seed)
    assert play(engine, random.Random(seed + 200), requests) == expected
    snapshot = engine.core.snapshot()
    assert snapshot.kv_contiguous > 50
    assert snapshot.kv_late > 0
    assert snapshot.kv_kept_pages > 0
    assert 0 < snapshot.kv_mappings <= 90


class StaleAfterEviction(NullMapper):
    """Believes its orders: what a space held before is read as if it had been mapped anew."""

    def _holds(self, space, pages) -> bool:
        there = self._there.get(space)
        return there is not None and all(
            len(a) >= len(b) and UNMAPPED not in a[b.count(-1) : len(b)]
            for a, b in zip(there, pages, strict=True)
        )


class OffByOne(NullMapper):
    """Maps a page one place too far, and takes it for the right one."""

    def pages_of(self, entry):
        pages = super().pages_of(entry)
        if self.space_of(entry) < 0:
            return pages
        return tuple((*group[1:], group[0]) if min(group) >= 0 else group for group in pages)


@pytest.mark.parametrize("fault", [StaleAfterEviction, OffByOne])
def test_a_wrong_mapping_shows_in_the_tokens(fault: type[NullMapper]) -> None:
    requests = load(random.Random(0), 14)
    expected = play(engine_with("full", None, 0), random.Random(100), requests)
    try:
        got = play(engine_with("full", fault, 0), random.Random(200), requests)
    except InternalError:
        return  # it read what was never written
    assert got != expected


# -- policy -------------------------------------------------------------------------------------------


def manager(
    num_pages: int, *, caching: bool = True, groups: tuple[KVGroup, ...] = (FULL,), **how
) -> PageManager:
    memory = PageManager(groups, [num_pages] * len(groups), caching)
    memory.map_into(NullMapper(len(groups), how.pop("num_spaces", 100), 32, **how))
    return memory


def run(memory: PageManager, tokens: list[int]):
    table = memory.match(ROOT, tokens, len(tokens) - 1)
    assert memory.grow(table, len(tokens))
    memory.computed(table, tokens, len(tokens))
    return table


def spaces_of(memory: PageManager) -> Spaces:
    assert memory.spaces is not None
    return memory.spaces


def test_a_conversation_gets_the_space_in_which_its_pages_stand() -> None:
    memory = manager(40)
    first = run(memory, list(range(200)))
    other = run(memory, list(range(1000, 1200)))
    space, pages = first.space, first.pages[0][:3]
    memory.release(first)
    memory.release(other)
    placed = spaces_of(memory).counters.num_placed
    again = run(memory, list(range(300)))
    assert (again.space, again.pages[0][:3]) == (space, pages)
    assert spaces_of(memory).counters.num_placed == placed + 1  # the fifth; the fourth stood there, too


def test_a_prefix_in_use_is_mapped_a_second_time() -> None:
    memory = manager(40)
    first = run(memory, list(range(200)))
    second = run(memory, [*range(192), 7, 7, 7])
    assert second.space != first.space
    assert second.pages[0][:3] == first.pages[0][:3]
    memory.release(first)
    memory.release(second)
    spaces_of(memory).check()


def test_pages_of_useless_prompts_are_handed_on_where_they_stand() -> None:
    """Random prompts in a full pool: nine of ten pages need no mapping."""
    memory = manager(120, caching=False)
    rng = random.Random(1)
    running: list = []
    counters = spaces_of(memory).counters
    for i in range(600):
        if len(running) == 6:
            memory.release(running.pop(0))
        running.append(run(memory, [rng.randrange(1 << 30) for _ in range(rng.randrange(64, 1000))]))
        if i == 200:
            before = counters.num_kept, counters.num_placed
    kept, placed = counters.num_kept - before[0], counters.num_placed - before[1]
    assert kept > 0.9 * (kept + placed)


def test_the_next_page_is_promised_before_it_is_needed() -> None:
    memory = manager(40)
    tokens = list(range(64 + 47))
    table = run(memory, tokens)
    for _ in range(2):
        tokens.append(1)
        assert memory.grow(table, len(tokens))
        memory.computed(table, tokens, len(tokens))
    promised = spaces_of(memory)._entries[table.space][0]
    assert len(promised) == 3
    other = run(memory, list(range(5000, 5300)))
    assert promised[2] not in other.pages[0]
    tokens += [1] * 40
    assert memory.grow(table, len(tokens))
    assert table.pages[0] == promised


def test_a_promise_holds_no_page_back() -> None:
    memory = manager(3)
    table = run(memory, list(range(64 + 50)))
    other = run(memory, list(range(5000, 5010)))
    assert table.num_pages == 2
    memory.release(other)
    memory.release(table)
    memory.check_idle()


def test_beyond_the_limit_idle_spaces_are_unmapped_and_then_tables_go_without() -> None:
    memory = manager(64, max_mappings=20)
    first = run(memory, list(range(400)))
    memory.release(first)
    second = run(memory, list(range(5000, 5600)))
    spaces = spaces_of(memory)
    assert spaces.counters.num_unmaps == 1
    third = run(memory, list(range(9000, 9600)))
    assert spaces.num_mappings <= 20
    assert spaces.is_there(second.space, second.pages)
    assert UNMAPPED in [spaces._at(third.space, 0, i) for i in range(10)]
    memory.release(second)
    memory.release(third)
    memory.check_idle()


def test_without_an_idle_space_a_table_goes_without() -> None:
    memory = manager(40, num_spaces=1)
    first, second = run(memory, list(range(100))), run(memory, list(range(900, 1000)))
    assert (first.space, second.space) == (0, -1)
    memory.release(first)
    assert memory.grow(second, 100)
    assert second.space == 0
    memory.release(second)
    memory.check_idle()
