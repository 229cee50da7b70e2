"""Random requests, moves, cuts, cancels, preemptions and slow wires: every request says what it would have
said alone, and after every event each page is in exactly one state."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.null.engine.moving.harness import Pair
from xllm.config import SchedulerConfig
from xllm.testing.null_engine import FULL, WINDOW, spec

GROUPS = ((FULL,), (FULL, WINDOW), (WINDOW,))

jobs = st.fixed_dictionaries(
    {
        "prompt_len": st.integers(1, 200),
        "family": st.integers(0, 1),
        "max_tokens": st.integers(1, 80),
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "logprobs": st.sampled_from([None, 1]),
        "prompt_logprobs": st.sampled_from([None, None, 1]),
    }
)
events = st.one_of(
    st.tuples(st.just("submit"), jobs),
    st.tuples(st.just("move"), st.tuples(st.integers(0, 7), st.booleans())),
    st.tuples(st.just("move"), st.tuples(st.integers(0, 7), st.booleans())),
    st.tuples(st.just("turns"), st.integers(1, 25)),
    st.tuples(st.just("wire"), st.integers(0, 5)),
    st.tuples(st.just("speed"), st.sampled_from([None, 0, 1, 3])),
    st.tuples(st.just("cut"), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.tuples(st.integers(0, 9), st.integers(0, 1))),
    st.tuples(st.just("preempt"), st.integers(0, 1)),
    st.tuples(st.just("forget cache"), st.integers(0, 1)),
)


def spec_of(name: str, job: dict[str, object]):
    fields = dict(job)
    length, family = fields.pop("prompt_len"), fields.pop("family")
    assert isinstance(length, int)
    assert isinstance(family, int)
    return spec(name, tuple((7 * i + 13 * family) % 500 + 3 for i in range(length)), seed=5, **fields)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from(GROUPS),
    caching=st.booleans(),
    chunk=st.sampled_from([24, 512]),
    num_pages=st.sampled_from([14, 40]),
    lookahead=st.booleans(),
    first=st.lists(jobs, min_size=1, max_size=4),
    schedule=st.lists(events, min_size=4, max_size=25),
)
def test_moves_change_nothing_but_the_place(
    groups, caching, chunk, num_pages, lookahead, first, schedule
) -> None:
    shape = {
        "groups": groups,
        "caching": caching,
        "num_pages": num_pages,
        "config": SchedulerConfig(max_num_batched_tokens=chunk, max_num_seqs=6),
    }
    pair = Pair(**shape, lookahead=lookahead)
    names: list[str] = []
    for kind, value in [*(("submit", job) for job in first), *schedule]:
        if kind == "submit" and len(names) < 6:
            names.append(f"r{len(names)}")
            pair.submit(spec_of(names[-1], value), at=len(names) % 2)
        elif kind == "move" and value[0] < len(names):
            pair.move(names[value[0]], pull=value[1])
        elif kind == "turns":
            for _ in range(value):
                pair.turn()
        elif kind == "wire":
            pair.wire.run(value)
            pair.hand_on()
        elif kind == "speed":
            pair.pages_per_turn = value
        elif kind == "cut" and pair.wire.flows:
            pair.wire.cut(sorted(pair.wire.flows)[value % len(pair.wire.flows)])
        elif kind == "cancel":
            pair.engines[value[1]].core.mover.cancel(f"t{value[0]}")
        elif kind == "preempt":
            pair.engines[value].core.scheduler.preempt_all()
        elif kind == "forget cache":
            pair.engines[value].memory.reset_prefix_cache()
        for engine in pair.engines:
            engine.memory.check()
    pair.pages_per_turn = None
    pair.finish()
    # Every Move has exactly one answer.
    assert len(pair.moved) == len({m.transfer_id for m in pair.moved}) == pair.num_moves
    for name in names:
        client = pair.clients[name]
        alone = Pair(num_engines=1, **shape)
        expected = alone.submit(client.first_spec)
        alone.finish()
        assert client.tokens == expected.tokens
        assert client.logprobs == expected.logprobs
        assert client.prompt_logprobs == expected.prompt_logprobs
        assert client.reasons == expected.reasons
        assert (client.num_last, client.error) == (1, None)
