"""Deltas of cached pages: applied one after another they give the pool's own names, whatever happened."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.config import SchedulerConfig
from xllm.engine.kv_news import KvTeller
from xllm.engine.memory import news
from xllm.engine.memory.news import PageNews
from xllm.service.kvindex import KvIndex
from xllm.testing.null_engine import FULL, WINDOW, NullEngine, null_engine, spec
from xllm.types import KVGroup
from xllm.wire.codec import HEADER, decode_engine, encode
from xllm.wire.messages import EngineMessage, KvDelta


class Listener:
    """Keeps what it was told, checking the numbers."""

    version = 2

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.names: set[bytes] = set()
        self.deltas: list[KvDelta] = []

    def send(self, message: EngineMessage) -> None:
        delta = decode_engine(encode(message)[HEADER.size :])
        assert isinstance(delta, KvDelta)
        assert delta.seq == len(self.deltas)
        assert delta.reset or self.deltas, "the first delta must be a reset"
        self.deltas.append(delta)
        if delta.reset:
            self.names.clear()
        self.names -= set(delta.removed)
        self.names |= set(delta.stored)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 400), st.integers(0, 3)),
        st.tuples(st.just("step"), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("preempt"), st.just(0), st.just(0)),
        st.tuples(st.just("forget"), st.just(0), st.just(0)),
        st.tuples(st.just("tell"), st.just(0), st.just(0)),
        st.tuples(st.just("gap"), st.just(0), st.just(0)),
        st.tuples(st.just("join"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


def run(engine: NullEngine, actions: list[tuple[str, int, int]]) -> list[Listener]:
    teller = KvTeller(engine.core)
    listeners = [Listener()]
    teller.add(listeners[0])
    for number, (what, size, kind) in enumerate(actions):
        if what == "submit":
            # Few different beginnings, so that prefixes are hit, shared and evicted.
            engine.core.submit(spec(str(number), (kind + 1,) * size, max_tokens=9, ignore_eos=True))
        elif what == "step":
            for _ in range(size):
                engine.step()
        elif what == "abort":
            engine.core.abort(str(size))
        elif what == "preempt":
            engine.core.scheduler.preempt_all()
        elif what == "forget":
            engine.memory.reset_prefix_cache()
        elif what == "gap":
            teller.start_over(listeners[0])
        elif what == "join":
            listeners.append(Listener(len(listeners)))
            teller.add(listeners[-1])
        else:
            teller.tell(may_wait=False)
            for listener in listeners:
                assert listener.names == set(engine.memory.names())
    engine.run()
    teller.tell(may_wait=False)
    return listeners


@settings(max_examples=80, deadline=None)
@given(
    actions=ACTIONS,
    num_pages=st.integers(8, 20),
    groups=st.sampled_from([(FULL,), (WINDOW, FULL), (WINDOW,)]),
)
def test_deltas_reproduce_the_pools_names(
    actions: list[tuple[str, int, int]], num_pages: int, groups: tuple[KVGroup, ...]
) -> None:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=128)
    engine = null_engine(num_pages=num_pages, groups=groups, config=config, max_model_len=512)
    for listener in run(engine, actions):
        assert listener.names == set(engine.memory.names())


def test_pages_that_are_evicted_are_told() -> None:
    engine = null_engine(num_pages=6)
    (listener,) = run(engine, [("submit", 200, 0), ("step", 30, 0), ("tell", 0, 0), ("submit", 250, 1)])
    assert [d for d in listener.deltas if d.removed], "nothing was evicted: this test shows nothing"
    assert listener.names == set(engine.memory.names())


def test_the_fronts_index_takes_them() -> None:
    engine = null_engine(num_pages=6)
    (listener,) = run(engine, [("submit", 200, 0), ("step", 30, 0), ("tell", 0, 0), ("submit", 250, 1)])
    index = KvIndex()
    assert all(index.apply("a", delta) for delta in listener.deltas)
    assert set(index.digests("a")) == set(engine.memory.names())
    index.check()


def test_nothing_is_told_without_a_prefix_cache_or_to_an_older_front() -> None:
    engine = null_engine(enable_prefix_caching=False)
    (listener,) = run(engine, [("submit", 200, 0), ("tell", 0, 0)])
    assert listener.deltas == []
    teller, old = KvTeller(null_engine().core), Listener()
    old.version = 1
    teller.add(old)
    teller.tell(may_wait=False)
    assert old.deltas == []


def test_too_many_changes_become_a_full_list() -> None:
    kept = PageNews(max_changes=3)
    for i in range(4):
        kept.stored(bytes([i]))
    kept.removed(b"x")
    assert kept
    assert kept.take().everything
    assert not kept
    kept.stored(b"a")
    kept.removed(b"a")
    kept.removed(b"b")
    kept.stored(b"b")
    changes = kept.take()
    assert (changes.stored, changes.removed, changes.everything) == ((b"b",), (b"a",), False)
    assert news.MAX_CHANGES > 1000


def test_a_long_list_goes_in_pieces(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("xllm.engine.kv_news.MAX_NAMES", 2)
    engine = null_engine(num_pages=40)
    engine.core.submit(spec("r", tuple(range(1, 401)), max_tokens=2, ignore_eos=True))
    engine.run()
    teller, listener = KvTeller(engine.core), Listener()
    teller.add(listener)
    teller.tell(may_wait=False)
    assert [d.reset for d in listener.deltas] == [True, False, False]
    assert len(listener.names) == 6
