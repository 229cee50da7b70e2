"""A request that moves between engines says what it would have said on one, and no page is lost."""

from __future__ import annotations

import pytest

from tests.null.engine.moving.harness import Pair
from xllm.config import SchedulerConfig
from xllm.testing.null_engine import FULL, WINDOW, spec
from xllm.types import RequestSpec

PROMPT = tuple(range(10, 210))
KINDS = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 7},
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
    "two": {"n": 2, "temperature": 1.0},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "n": 3},
}


def request(kind: str, **more: object) -> RequestSpec:
    return spec("a", PROMPT, **({"max_tokens": 100} | KINDS[kind] | more))


def unmoved(of: RequestSpec, **pair: object):
    alone = Pair(num_engines=1, **pair)
    client = alone.submit(of)
    alone.finish()
    return client


def same(one, other) -> None:
    assert one.tokens == other.tokens
    assert one.logprobs == other.logprobs
    assert one.prompt_logprobs == other.prompt_logprobs
    assert one.reasons == other.reasons
    assert (one.num_last, one.error) == (1, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_success_may_be_told_before_the_step_thread_knows_and_is_told_once(kind: str) -> None:
    expected = unmoved(request(kind))
    pair = Pair(early=True)
    client = pair.submit(request(kind))
    pair.move("a")
    pair.until(lambda: client.at == 1)
    assert pair.engines[0].core.mover.take_answers() == []
    pair.finish()
    same(client, expected)
    assert [(m.error, m.num_bytes > 0) for m in pair.moved] == [(None, True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "window"])
@pytest.mark.parametrize("pull", [False, True], ids=["push", "pull"])
@pytest.mark.parametrize("chunk", [32, 512])
@pytest.mark.parametrize("caching", [False, True], ids=["no cache", "cache"])
def test_moved_during_prefill(kind, groups, pull, chunk, caching) -> None:
    shape = {"groups": groups, "config": SchedulerConfig(max_num_batched_tokens=chunk), "caching": caching}
    expected = unmoved(request(kind), **shape)
    pair = Pair(**shape)
    client = pair.submit(request(kind))
    pair.move("a", pull=pull)
    pair.finish()
    same(client, expected)
    assert [m.error for m in pair.moved] == [None]
    assert client.at == 1
    there = pair.engines[1].core.mover.counters
    # What the second engine computed of the prompt tells whether the pages were used.
    assert there.num_in == 1
    assert there.claimed_rows >= len(PROMPT)
    assert pair.engines[1].core.snapshot().prompt_tokens == 0


@pytest.mark.parametrize("kind", ["greedy", "two", "logprobs"])
@pytest.mark.parametrize("pull", [False, True], ids=["push", "pull"])
@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW), (WINDOW,)], ids=["full", "both", "window"])
def test_moved_to_and_fro_while_it_decodes(kind, pull, groups) -> None:
    expected = unmoved(request(kind, ignore_eos=True), groups=groups)
    pair = Pair(groups=groups)
    client = pair.submit(request(kind, ignore_eos=True))
    for count in (3, 30, 56, 90):
        pair.until(lambda count=count: len(client.tokens.get(0, ())) >= count)
        at = client.at
        pair.move("a", pull=pull)
        pair.until(lambda at=at: client.at != at)
    pair.finish()
    same(client, expected)
    assert [m.error for m in pair.moved] == [None] * 4
    assert sum(e.core.mover.counters.num_in for e in pair.engines) == 4


def test_a_slow_wire_lets_it_go_on_meanwhile() -> None:
    expected = unmoved(request("greedy", ignore_eos=True))
    pair = Pair()
    client = pair.submit(request("greedy", ignore_eos=True))
    pair.until(lambda: len(client.tokens.get(0, ())) >= 2)
    pair.pages_per_turn = 1
    before = len(client.tokens[0])
    pair.move("a")
    pair.until(lambda: client.at == 1)
    assert len(client.tokens[0]) > before + 2
    pair.finish()
    same(client, expected)


def test_a_wire_that_is_too_slow_is_given_up() -> None:
    pair = Pair()
    client = pair.submit(request("greedy", ignore_eos=True, max_tokens=300))
    pair.until(lambda: len(client.tokens.get(0, ())) >= 2)
    pair.pages_per_turn = 0
    pair.move("a")
    pair.until(lambda: bool(pair.moved))
    assert pair.moved[0].error is not None
    assert pair.moved[0].error.code == "transfer_too_slow"
    pair.pages_per_turn = None
    pair.finish()
    same(client, unmoved(request("greedy", ignore_eos=True, max_tokens=300)))
