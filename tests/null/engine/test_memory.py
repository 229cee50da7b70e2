"""Pages: conservation, sharing, names, windows, forks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm.engine.memory import manager as manager_module
from xllm.engine.memory.manager import FREED, PageManager
from xllm.engine.memory.pool import PagePool
from xllm.errors import InternalError
from xllm.testing.null_engine import FULL, WINDOW

ROOT = b"root"


def manager(num_pages: int = 16, groups=(FULL,), caching: bool = True) -> PageManager:
    return PageManager(groups, [num_pages] * len(groups), caching)


def filled(memory: PageManager, tokens: list[int]):
    table = memory.new_table(ROOT)
    assert memory.grow(table, len(tokens))
    memory.computed(table, tokens, len(tokens))
    return table


def test_a_prefix_is_found_page_by_page_and_never_beyond_the_limit() -> None:
    memory = manager()
    tokens = list(range(200))
    table = filled(memory, tokens)
    memory.release(table)
    assert memory.counts().reusable == 3
    assert memory.match(ROOT, tokens, 199).num_pages == 3
    assert memory.match(ROOT, tokens, 191).num_pages == 2
    assert memory.match(ROOT, [*tokens[:100], -1, *tokens[101:]], 199).num_pages == 1
    assert memory.match(b"other salt", tokens, 199).num_pages == 0


def test_a_digest_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "page_digest", lambda *_: b"same for all")
    memory = manager()
    memory.release(filled(memory, list(range(64))))
    assert memory.match(ROOT, list(range(64)), 64).num_pages == 1
    assert memory.match(ROOT, list(range(1, 65)), 64).num_pages == 0
    assert memory.match(b"other root", list(range(64)), 64).num_pages == 0


def test_a_refused_grow_takes_nothing() -> None:
    memory = manager(num_pages=3)
    table = memory.new_table(ROOT)
    assert memory.grow(table, 100)
    before = memory.counts()
    assert not memory.grow(table, 64 * 4)
    assert memory.counts() == before


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    memory = manager(num_pages=4)
    memory.release(filled(memory, list(range(256))))
    other = memory.new_table(b"other")
    assert memory.grow(other, 64)
    assert memory.match(ROOT, list(range(256)), 256).num_pages == 3


def test_a_window_group_gives_back_what_no_later_row_can_see() -> None:
    memory = manager(groups=(FULL, WINDOW))
    table = filled(memory, list(range(300)))
    # The next row (position 300, window 100) sees positions 201…299: pages 3 and 4.
    assert [p == FREED for p in table.pages[1]] == [True, True, True, False, False]
    assert FREED not in table.pages[0]
    memory.release(table)
    memory.check_idle()


def test_a_prefix_hit_needs_only_the_visible_pages_of_a_window_group() -> None:
    memory = manager(groups=(FULL, WINDOW))
    tokens = list(range(320))
    memory.release(filled(memory, tokens))
    table = memory.match(ROOT, tokens, 319)
    assert table.num_pages == 4
    assert [p == FREED for p in table.pages[1]] == [True, True, False, False]


def test_a_fork_shares_full_pages_and_copies_the_partial_one() -> None:
    memory = manager()
    table = filled(memory, list(range(100)))
    forked = memory.fork(table, 100)
    assert forked is not None
    child, copies = forked
    assert child.pages[0][0] == table.pages[0][0]
    assert [(c.src, c.dst) for c in copies] == [(table.pages[0][1], child.pages[0][1])]
    assert memory.counts().owned == 3
    memory.release(table)
    memory.release(child)
    memory.check_idle()


def test_a_fork_without_a_free_page_is_refused_and_takes_nothing() -> None:
    memory = manager(num_pages=2)
    table = filled(memory, list(range(100)))
    before = memory.counts()
    assert memory.fork(table, 100) is None
    assert memory.counts() == before


def test_releasing_twice_is_a_broken_invariant() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(InternalError):
        pool.release(page)
    with pytest.raises(InternalError):
        pool.share(page)


class PagesAreConserved(RuleBasedStateMachine):
    """Random tables over a small pool; the model is the set of live tables."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = manager(num_pages=12, groups=(FULL, WINDOW))
        self.tables: list[tuple[object, list[int]]] = []

    @rule(family=st.integers(0, 2), length=st.integers(1, 300))
    def start(self, family: int, length: int) -> None:
        tokens = [family * 1000 + i for i in range(length)]
        table = self.memory.match(ROOT, tokens, length - 1)
        if self.memory.grow(table, length):
            self.memory.computed(table, tokens, length)
            self.tables.append((table, tokens))
        else:
            self.memory.release(table)

    @rule(index=st.integers(0, 20), more=st.integers(1, 100))
    def extend(self, index: int, more: int) -> None:
        if not self.tables:
            return
        table, tokens = self.tables[index % len(self.tables)]
        if self.memory.grow(table, len(tokens) + more):
            tokens.extend(range(more))
            self.memory.computed(table, tokens, len(tokens))

    @rule(index=st.integers(0, 20))
    def fork(self, index: int) -> None:
        if not self.tables:
            return
        table, tokens = self.tables[index % len(self.tables)]
        forked = self.memory.fork(table, len(tokens))
        if forked is not None:
            self.tables.append((forked[0], list(tokens)))

    @rule(index=st.integers(0, 20))
    def end(self, index: int) -> None:
        if self.tables:
            table, _ = self.tables.pop(index % len(self.tables))
            self.memory.release(table)

    @rule()
    def forget(self) -> None:
        self.memory.reset_prefix_cache()

    @invariant()
    def conserved(self) -> None:
        self.memory.check()
        c = self.memory.counts()
        assert c.free + c.reusable + c.owned == c.total

    @invariant()
    def a_plan_shows_the_pages_as_they_are(self) -> None:
        for table, _ in self.tables:
            assert table.as_plan() == tuple(map(tuple, table.pages))

    def teardown(self) -> None:
        for table, _ in self.tables:
            self.memory.release(table)
        self.memory.check_idle()


TestPagesAreConserved = PagesAreConserved.TestCase
TestPagesAreConserved.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
