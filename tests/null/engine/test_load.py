"""The counts a router goes by equal what a walk over all sequences would find, after any schedule."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.config import SchedulerConfig
from xllm.testing.null_engine import NullEngine, null_engine, spec


def check(engine: NullEngine) -> None:
    sequences = engine.core.scheduler.sequences
    behind = [s for s in sequences if s.behind > 1]
    decoding = [s for s in sequences if s.behind <= 1]
    told = engine.core.snapshot()
    assert told.backlog_tokens == sum(s.behind for s in behind)
    assert told.num_decoding == len(decoding)
    assert told.decode_context == sum(len(s.tokens) for s in decoding)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 300), st.integers(1, 3)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("preempt"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, num_pages=st.integers(8, 24))
def test_the_load_is_what_is_there(actions: list[tuple[str, int, int]], num_pages: int) -> None:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    engine = null_engine(num_pages=num_pages, config=config, max_model_len=512)
    for number, (what, size, n) in enumerate(actions):
        if what == "submit":
            prompt = tuple(range(size % 7, size % 7 + size))
            engine.core.submit(spec(str(number), prompt, max_tokens=20, n=n, ignore_eos=True))
        elif what == "abort":
            engine.core.abort(str(size))
        elif what == "preempt":
            engine.core.scheduler.preempt_all()
        else:
            for _ in range(size):
                engine.step()
                check(engine)
        check(engine)
    engine.run()
    check(engine)
    idle = engine.core.snapshot()
    assert (idle.backlog_tokens, idle.num_decoding, idle.decode_context) == (0, 0, 0)


def test_what_is_left_of_a_prompt_is_backlog_until_it_is_computed() -> None:
    engine = null_engine(config=SchedulerConfig(max_num_batched_tokens=64))
    engine.core.submit(spec("r", tuple(range(1, 161)), max_tokens=10, ignore_eos=True))
    seen = [engine.core.snapshot().backlog_tokens]
    for _ in range(4):
        engine.step()
        seen.append(engine.core.snapshot().backlog_tokens)
    assert seen == [160, 96, 32, 0, 0]
    told = engine.core.snapshot()
    assert (told.num_decoding, told.decode_context) == (1, 162)


def test_a_frame_tells_what_its_attempt_waited_for_and_how_often_it_was_preempted() -> None:
    engine = null_engine()
    engine.core.submit(spec("r", tuple(range(1, 100)), max_tokens=4, ignore_eos=True))
    first = engine.step()
    assert first[0].prefill_ms > 0.0
    assert first[0].num_preemptions == 0
    engine.core.scheduler.preempt_all()
    last = engine.run()[-1]
    assert last.last
    assert last.num_preemptions == 1
    assert last.prefill_ms == first[0].prefill_ms
