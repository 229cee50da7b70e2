"""The KV index: numbered deltas in, leading runs out, against a literal model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.service.kvindex import TIERS, KvIndex
from xllm.wire.messages import KvDelta


def page(n: int) -> bytes:
    return n.to_bytes(16, "big")


def pages(*numbers: int) -> tuple[bytes, ...]:
    return tuple(page(n) for n in numbers)


class Literal:
    """The index as its definition says it: every holder's pages and tiers, matched page by page."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, set[str]]] = {}
        self.expected: dict[str, int | None] = {}

    def apply(self, instance: str, delta: KvDelta) -> bool:
        if delta.reset:
            self.held[instance] = {}
        elif self.expected.get(instance) != delta.seq:
            self.expected[instance] = None
            return False
        self.expected[instance] = delta.seq + 1
        held = self.held[instance]
        for digest in delta.removed:
            tiers = held.get(digest, set())
            tiers.discard(delta.tier)
            if not tiers:
                held.pop(digest, None)
        for digest in delta.stored:
            held.setdefault(digest, set()).add(delta.tier)
        return True

    def purge(self, instance: str) -> int:
        self.expected.pop(instance, None)
        return len(self.held.pop(instance, {}))

    def match(self, chain: tuple[bytes, ...]) -> dict[str, tuple[tuple[str, int], ...]]:
        found = {}
        for instance, held in self.held.items():
            best: list[str] = []
            for digest in chain:
                if digest not in held:
                    break
                best.append(min(held[digest], key=TIERS.index))
            if best:
                found[instance] = tuple((t, best.count(t)) for t in TIERS if t in best)
        return found


def test_a_run_is_contiguous_from_the_first_page_and_counts_each_page_once() -> None:
    index = KvIndex()
    assert index.apply("a", KvDelta(seq=0, reset=True, stored=pages(1, 2, 4)))
    assert index.apply("b", KvDelta(seq=0, reset=True, stored=pages(1, 2, 3, 4)))
    assert index.apply("b", KvDelta(seq=1, stored=pages(2, 5), tier="dram"))
    assert index.apply("c", KvDelta(seq=0, reset=True, stored=pages(2, 3, 4)))
    assert index.match(pages(1, 2, 3, 4, 5)) == {
        "a": (("device", 2),),
        "b": (("device", 4), ("dram", 1)),
    }
    assert index.match(()) == {}
    assert index.match(pages(9, 1)) == {}


def test_a_page_counts_in_the_best_tier_that_is_left() -> None:
    index = KvIndex()
    index.apply("a", KvDelta(seq=0, reset=True, stored=pages(1)))
    index.apply("a", KvDelta(seq=1, stored=pages(1), tier="ssd"))
    index.apply("a", KvDelta(seq=2, stored=pages(1), tier="dram"))
    assert index.match(pages(1)) == {"a": (("device", 1),)}
    index.apply("a", KvDelta(seq=3, removed=pages(1)))
    assert index.match(pages(1)) == {"a": (("dram", 1),)}
    index.apply("a", KvDelta(seq=4, removed=pages(1), tier="dram"))
    assert index.match(pages(1)) == {"a": (("ssd", 1),)}
    assert index.digests("a", "ssd") == {page(1)}
    index.apply("a", KvDelta(seq=5, removed=pages(1), tier="ssd"))
    assert index.match(pages(1)) == {}
    assert len(index) == 0


def test_the_first_delta_must_be_a_reset() -> None:
    index = KvIndex()
    assert not index.apply("a", KvDelta(seq=0, stored=pages(1)))
    assert index.match(pages(1)) == {}
    assert index.apply("a", KvDelta(seq=7, reset=True, stored=pages(1)))
    assert index.apply("a", KvDelta(seq=8, stored=pages(2)))


@pytest.mark.parametrize("seq", [2, 0, 5])
def test_a_gap_or_a_repeat_asks_until_a_reset_comes(seq: int) -> None:
    index = KvIndex()
    index.apply("a", KvDelta(seq=0, reset=True, stored=pages(1, 2)))
    assert not index.apply("a", KvDelta(seq=seq, removed=pages(1)))
    assert not index.apply("a", KvDelta(seq=1, removed=pages(1)))
    assert not index.apply("a", KvDelta(seq=seq + 1, removed=pages(1)))
    assert index.match(pages(1, 2)) == {"a": (("device", 2),)}
    assert index.apply("a", KvDelta(seq=9, reset=True, stored=pages(2)))
    assert index.match(pages(1, 2)) == {}
    assert index.digests("a") == {page(2)}
    index.check()


def test_an_incarnation_starts_from_nothing() -> None:
    index = KvIndex()
    index.apply("a", KvDelta(seq=0, reset=True, stored=pages(1, 2)))
    index.apply("b", KvDelta(seq=0, reset=True, stored=pages(1)))
    assert index.purge("a") == 2
    assert index.purge("a") == 0
    assert index.match(pages(1, 2)) == {"b": (("device", 1),)}
    assert index.instances() == ("b",)
    assert not index.apply("a", KvDelta(seq=1, stored=pages(3)))
    assert index.apply("c", KvDelta(seq=0, reset=True, stored=pages(2)))
    assert index.match(pages(1, 2)) == {"b": (("device", 1),)}
    index.check()


def test_within_a_delta_what_was_removed_comes_first() -> None:
    index = KvIndex()
    index.apply("a", KvDelta(seq=0, reset=True, stored=pages(1)))
    index.apply("a", KvDelta(seq=1, stored=pages(1), removed=pages(1)))
    assert index.match(pages(1)) == {"a": (("device", 1),)}


def test_digests_of_a_wrong_length_are_a_reason_to_ask_again() -> None:
    index = KvIndex()
    index.apply("a", KvDelta(seq=0, reset=True, stored=pages(1)))
    assert not index.apply("a", KvDelta(seq=1, stored=(b"short",)))
    assert not index.apply("a", KvDelta(seq=2, stored=pages(2)))
    assert index.digests("a") == {page(1)}


def test_a_tier_that_is_not_known_here_is_passed_over_without_a_gap() -> None:
    index = KvIndex()
    index.apply("a", KvDelta(seq=0, reset=True))
    assert index.apply("a", KvDelta(seq=1, stored=pages(1), tier="hologram"))
    assert index.apply("a", KvDelta(seq=2, stored=pages(2)))
    assert index.digests("a") == {page(2)}


def test_what_one_instance_may_claim_is_bounded() -> None:
    index = KvIndex(max_pages=3)
    assert index.apply("a", KvDelta(seq=0, reset=True, stored=pages(*range(10))))
    assert index.num_pages("a") == len(index) == 3
    assert index.apply("b", KvDelta(seq=0, reset=True, stored=pages(20, 21)))
    assert index.num_pages("b") == 2
    index.check()


def delta_of(rng: random.Random, seq: int, *, reset: bool) -> KvDelta:
    def some() -> tuple[bytes, ...]:
        return pages(*(rng.randrange(12) for _ in range(rng.randrange(6))))

    tier = rng.choice(TIERS)
    return KvDelta(seq=seq, stored=some(), removed=() if reset else some(), reset=reset, tier=tier)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_it_does_what_the_literal_model_does(seed: int) -> None:
    rng = random.Random(seed)
    index, literal = KvIndex(), Literal()
    seqs = dict.fromkeys("abcd", 0)
    for _ in range(60):
        name = rng.choice("abcd")
        if rng.random() < 0.05:
            assert index.purge(name) == literal.purge(name)
            continue
        if rng.random() < 0.05:
            seqs[name] += 1
        delta = delta_of(rng, seqs[name], reset=rng.random() < 0.15)
        seqs[name] += 1
        assert index.apply(name, delta) == literal.apply(name, delta)
        chain = pages(*rng.sample(range(12), 8)) if rng.random() < 0.5 else pages(*range(10))
        assert index.match(chain) == literal.match(chain)
    index.check()
    for name in "abcd":
        assert index.digests(name) == set(literal.held.get(name, {}))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_replicas_that_hear_instances_in_another_order_are_equal(seed: int) -> None:
    rng = random.Random(seed)
    streams = {name: [delta_of(rng, i, reset=i in (0, 9)) for i in range(15)] for name in "abc"}
    replicas = []
    for _ in range(2):
        index, left = KvIndex(), {name: list(deltas) for name, deltas in streams.items()}
        while left:
            name = rng.choice(sorted(left))
            assert index.apply(name, left[name].pop(0))
            if not left[name]:
                del left[name]
        index.check()
        replicas.append(index)
    chain = pages(*range(12))
    assert replicas[0].match(chain) == replicas[1].match(chain)
    for name in streams:
        for tier in TIERS:
            assert replicas[0].digests(name, tier) == replicas[1].digests(name, tier)
