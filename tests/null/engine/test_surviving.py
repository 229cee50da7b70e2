"""Pages that outlive their engine: what is taken over is what was computed, and damage is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm.config import SchedulerConfig
from xllm.engine.memory.pool import PagePool, PrefixKey
from xllm.engine.plan import StepPlan, StepResult
from xllm.engine.surviving import SharedPages
from xllm.engine.surviving.adopt import in_order_of_use
from xllm.engine.surviving.headers import (
    PAGE_HEADER,
    VALID,
    FileHeader,
    content_digest,
    read_file_header,
    read_page_header,
    write_file_header,
    write_page_header,
)
from xllm.errors import ConfigError, InternalError
from xllm.prefix import page_digest
from xllm.service.instances.pages import SlotPages
from xllm.testing.null_engine import FULL, WINDOW, NullEngine, null_engine, outputs, spec
from xllm.types import PAGE_SIZE

NUM_PAGES = 24
PROMPT = tuple(range(3, 3 + 5 * PAGE_SIZE + 7))


@pytest.fixture
def slot() -> Iterator[SlotPages]:
    pages = SlotPages("test")
    yield pages
    pages.close()


def life(slot: SlotPages, **how: object) -> NullEngine:
    """The next engine of the slot; the one before it is as good as killed, since it is never told."""
    assert slot.fd is not None
    return null_engine(shared=SharedPages(slot.fd), num_pages=NUM_PAGES, **how)  # type: ignore[arg-type]


def answer(
    engine: NullEngine, name: str = "r", prompt: tuple[int, ...] = PROMPT
) -> tuple[tuple[int, ...], int]:
    """(tokens, prompt tokens that came from the cache)."""
    engine.core.submit(spec(name, prompt, max_tokens=8))
    frames = engine.run()
    engine.step()
    return outputs(frames)[name, 0], max(f.num_cached_tokens for f in frames)


def valid_pages(shared: SharedPages, group: int = 0) -> list[int]:
    return np.flatnonzero(shared.groups[group].headers["state"] == VALID).tolist()


def memory_of(engine: NullEngine) -> SharedPages:
    assert engine.core.keeper is not None
    return engine.core.keeper._shared


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)])
def test_the_next_engine_reuses_what_a_killed_one_computed(
    slot: SlotPages, groups: tuple[object, ...]
) -> None:
    first = life(slot, groups=groups)
    expected, cached = answer(first)
    assert cached == 0
    second = life(slot, groups=groups)
    assert second.adopted is not None
    assert second.adopted.num_refused == 0
    assert second.memory.counts().reusable == second.adopted.num_taken >= 5
    assert answer(second) == (expected, 5 * PAGE_SIZE)
    third = life(slot, groups=groups)
    assert answer(third) == (expected, 5 * PAGE_SIZE)


def test_what_was_written_by_a_killed_engine_is_no_more_than_complete_pages(slot: SlotPages) -> None:
    first = life(slot)
    first.core.submit(spec("r", PROMPT, max_tokens=8))
    first.step()
    # The step that named the pages is over, and none has a header yet: they are written between steps.
    assert valid_pages(memory_of(first)) == []
    for num_steps in range(1, 4):
        first.step()
        assert len(valid_pages(memory_of(first))) == num_steps
    assert life(slot).adopted.num_taken == 3  # type: ignore[union-attr]


def test_headers_follow_in_proportion_to_the_steps_and_all_of_them_at_the_end(slot: SlotPages) -> None:
    engine = life(slot)
    engine.core.submit(spec("r", PROMPT, max_tokens=40))
    written = []
    while engine.core.has_requests:
        engine.step()
        written.append(len(valid_pages(memory_of(engine))))
    assert all(after - before <= 1 for before, after in zip(written[1:], written[2:], strict=False))
    engine.core.close()
    assert engine.core.keeper is not None
    assert engine.core.keeper.num_due == 0


@pytest.mark.parametrize("where", ["content", "header"])
def test_a_flipped_bit_is_refused_and_counted_and_the_answer_stays_right(slot: SlotPages, where: str) -> None:
    first = life(slot)
    expected, _ = answer(first)
    shared = memory_of(first)
    pages = valid_pages(shared)
    if where == "content":
        shared.groups[0].pages[pages[1], 17] ^= 4
    else:
        flat = shared.groups[0].headers.view(np.uint8)
        flat[pages[1] * PAGE_HEADER.itemsize + 100] ^= 4
    second = life(slot)
    assert second.adopted is not None
    assert (second.adopted.num_taken, second.adopted.num_refused) == (len(pages) - 1, 1)
    tokens, cached = answer(second)
    assert tokens == expected
    assert cached < 5 * PAGE_SIZE
    assert life(slot).adopted.num_refused == 0  # type: ignore[union-attr]


def test_no_flipped_bit_of_a_header_goes_unseen() -> None:
    tokens = tuple(range(PAGE_SIZE))
    key = PrefixKey(page_digest(b"p" * 16, tokens), b"p" * 16, tokens)
    table = np.zeros(3, PAGE_HEADER)
    write_page_header(table, 1, 2, 77, key, b"c" * 16)
    assert read_page_header(table, 1, 2) == (key, b"c" * 16, 77)
    assert read_page_header(table, 0, 2) is None
    table[1] = table[2]
    assert read_page_header(table, 1, 1) is None, "a header means its own page only"
    flat = table.view(np.uint8)
    first = 2 * PAGE_HEADER.itemsize
    for bit in range(8 * PAGE_HEADER.itemsize):
        flat[first + bit // 8] ^= 1 << bit % 8
        assert read_page_header(table, 1, 2) is None, bit
        flat[first + bit // 8] ^= 1 << bit % 8


def test_a_name_that_does_not_follow_from_its_tokens_is_not_believed() -> None:
    table = np.zeros(1, PAGE_HEADER)
    tokens = tuple(range(PAGE_SIZE))
    write_page_header(table, 0, 0, 0, PrefixKey(b"x" * 16, b"p" * 16, tokens), b"c" * 16)
    assert read_page_header(table, 0, 0) is None


def test_a_damaged_file_header_is_none() -> None:
    where = memoryview(bytearray(4096))
    header = FileHeader(numerics_class="c", layout_digest="d", groups=((4, 256), (4, 512)))
    assert read_file_header(where) is None
    write_file_header(where, header)
    assert read_file_header(where) == header
    end = bytes(where).rstrip(b"\0")
    for bit in range(8 * len(end)):
        where[bit // 8] ^= 1 << bit % 8
        assert read_file_header(where) is None, bit
        where[bit // 8] ^= 1 << bit % 8


def test_pages_of_another_class_or_layout_are_never_taken(slot: SlotPages) -> None:
    answer(life(slot))
    assert slot.fd is not None
    shared = SharedPages(slot.fd)
    assert shared.found is not None
    assert shared.num_pages(shared.found.layout_digest, (PAGE_SIZE * 4,)) == NUM_PAGES
    assert shared.num_pages("other", (PAGE_SIZE * 4,)) is None
    assert shared.num_pages(shared.found.layout_digest, (PAGE_SIZE * 8,)) is None
    shared.next_group(NUM_PAGES, PAGE_SIZE * 4)
    assert len(valid_pages(shared)) > 0
    assert not shared.bind("other class", shared.found.layout_digest)
    assert valid_pages(shared) == []
    assert life(slot).adopted.num_taken == 0  # type: ignore[union-attr]


def test_without_prefix_caching_nothing_is_taken_and_nothing_left(slot: SlotPages) -> None:
    answer(life(slot))
    engine = life(slot, enable_prefix_caching=False)
    assert engine.adopted is not None
    assert engine.adopted.num_taken == 0
    assert valid_pages(memory_of(engine)) == []
    assert answer(engine)[1] == 0


def test_only_an_anonymous_file_that_cannot_shrink_is_mapped(slot: SlotPages) -> None:
    read, write = os.pipe()
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for fd in (read, unsealed):
            with pytest.raises(ConfigError, match="sealed"):
                SharedPages(fd)
    finally:
        for fd in (read, write, unsealed):
            os.close(fd)
    assert slot.fd is not None
    SharedPages(slot.fd).next_group(4, 256)
    with pytest.raises(PermissionError):
        os.ftruncate(slot.fd, 0)


def test_renewed_memory_is_empty(slot: SlotPages) -> None:
    answer(life(slot))
    slot.renew()
    assert life(slot).adopted.num_taken == 0  # type: ignore[union-attr]


def test_the_longest_unused_chain_goes_first_and_tails_before_heads() -> None:
    def page(name: bytes, parent: bytes) -> PrefixKey:
        return PrefixKey(name * 16, parent * 16, ())

    old = [page(b"a", b"r"), page(b"b", b"a"), page(b"c", b"b")]
    new = [page(b"x", b"r"), page(b"y", b"x")]
    # The old chain was begun first; its head was used again by the new tail of another turn, "d".
    turn = [page(b"d", b"a")]
    found = [(i, i, key) for i, key in enumerate([*old, *new, *turn])]
    random.Random(1).shuffle(found)
    order = [key.digest[:1] for _, _, key in in_order_of_use(found)]
    assert order == [b"c", b"b", b"y", b"x", b"d", b"a"]


def test_a_pool_takes_over_free_pages_only_and_evicts_the_first_one_first() -> None:
    keys = [PrefixKey(bytes([i]) * 16, b"r" * 16, (i,)) for i in range(4)]
    pool = PagePool(4)
    owned = pool.allocate()
    with pytest.raises(InternalError):
        pool.adopt([(owned, keys[0])])
    free = [p for p in range(4) if p != owned]
    assert pool.adopt([(free[2], keys[2]), (free[0], keys[0]), (free[1], keys[2])]) == 2
    pool.check()
    assert pool.find(keys[0]) == free[0]
    assert pool.allocate() == free[1]
    assert pool.allocate() == free[2]
    assert pool.find(keys[2]) is None
    assert pool.find(keys[0]) == free[0]


class Killer:
    """Looks at the memory as a successor would find it, before and after every step."""

    def __init__(self, engine: NullEngine) -> None:
        self.num_seen = 0
        # Collected, since the executor takes whatever is raised below it for a sequence's failure.
        self.lies: list[str] = []
        self._shared = memory_of(engine)
        self._engine = engine
        self._execute = engine.runner.execute
        engine.runner.execute = self.execute  # type: ignore[method-assign]

    def execute(self, plan: StepPlan) -> StepResult:
        self.look()
        result = self._execute(plan)
        self.look()
        return result

    def look(self) -> None:
        for g, group in enumerate(self._shared.groups):
            for page in valid_pages(self._shared, g):
                self.num_seen += 1
                header = read_page_header(group.headers, g, page)
                if header is None:
                    self.lies.append(f"page {page}: no whole header")
                    continue
                key, content, _ = header
                if content_digest(group.pages[page]) != content:
                    self.lies.append(f"page {page}: another content")
                if tuple(group.pages[page].view(np.int32)) != key.tokens:
                    self.lies.append(f"page {page}: other tokens")


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whenever_an_engine_is_killed_every_valid_header_tells_the_truth(seed: int) -> None:
    """A pool far too small for its prompts: pages change hands all the time."""
    random_ = random.Random(seed)
    pages = SlotPages("test")
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=random_.choice([100, 1000]))
    try:
        engine = life(pages, groups=random_.choice([(FULL,), (FULL, WINDOW)]), config=config)
        killer = Killer(engine)
        for i in range(12):
            kind, length = random_.choice([2, 3]), random_.randrange(1, 16) * PAGE_SIZE
            head = tuple(3 + kind * i % 500 for i in range(length))
            prompt = (*head, *(random_.randrange(3, 500) for _ in range(random_.randrange(1, 100))))
            engine.core.submit(
                spec(f"r{i}", prompt, max_tokens=random_.randrange(1, 90), n=random_.choice([1, 2]))
            )
            for _ in range(random_.randrange(4)):
                engine.step()
            if random_.random() < 0.5:
                engine.core.abort(f"r{i}")
            if random_.random() < 0.05:
                engine.memory.reset_prefix_cache()
        engine.run()
        engine.step()
        killer.look()
        assert killer.num_seen > 0
        assert killer.lies == []
    finally:
        pages.close()
