"""Cache-aware placement over many requests, with the front's memory: who stays, who is spread."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from tests.null.service.router.tables import ask, instance, request
from xllm.service.kvindex import KvIndex
from xllm.service.router.cache_aware import cache_aware
from xllm.service.router.memory import PlacementMemory
from xllm.types import PAGE_SIZE
from xllm.wire.messages import KvDelta

Chain = list[bytes]


class Fleet:
    """Idle instances that have computed what was placed there, behind the index and memory of one front."""

    def __init__(self, num_instances: int) -> None:
        self.names = [f"e{i}" for i in range(num_instances)]
        self.index, self.memory = KvIndex(), PlacementMemory()
        self.seqs = dict.fromkeys(self.names, 1)
        for name in self.names:
            self.index.apply(name, KvDelta(seq=0, reset=True))

    def place(self, name: str, chain: Chain, *, ends: bool = True) -> str:
        found, recent = self.index.match(chain), self.memory.recent_ms(self.names)
        views = [
            instance(n, recent=recent[n], matched=self.memory.matched(n, chain, found.get(n, ())))
            for n in self.names
        ]
        placement = ask(cache_aware, request(len(chain) * PAGE_SIZE + 10, name=name), *views)
        assert placement is not None
        where = placement.instance
        self.memory.placed(name, where, placement.work_ms, self.names, chain)
        if ends:
            assert self.index.apply(where, KvDelta(seq=self.seqs[where], stored=tuple(chain)))
            self.seqs[where] += 1
            self.memory.settled(name)
        return where


def pages(label: str, num: int) -> Chain:
    return [f"{label}{i}".encode().ljust(16, b".") for i in range(num)]


@pytest.mark.parametrize("num_instances", [2, 3, 8])
def test_a_lone_conversation_stays_where_its_pages_are(num_instances: int) -> None:
    fleet, chain = Fleet(num_instances), pages("c", 4)
    where = []
    for turn in range(60):
        where.append(fleet.place(f"turn{turn}", chain))
        chain = chain + pages(f"t{turn}.", 1)
    assert len(set(where[:20])) == 1
    assert sum(a != b for a, b in pairwise(where)) <= 2


@pytest.mark.parametrize("num_instances", [3, 8])
def test_conversations_under_one_system_prompt_are_spread_and_each_stays(num_instances: int) -> None:
    fleet, system = Fleet(num_instances), pages("s", 10)
    homes: dict[int, set[str]] = {c: set() for c in range(20 * num_instances)}
    chains = {c: system + pages(f"c{c}.", 2) for c in homes}
    for turn in range(4):
        for c in homes:
            homes[c].add(fleet.place(f"{c}.{turn}", chains[c]))
            chains[c] = chains[c] + pages(f"c{c}t{turn}.", 3)
    loads = Counter(min(where) for where in homes.values())
    assert len(loads) == num_instances
    assert max(loads.values()) <= 1.3 * 20
    moved = sum(len(where) > 1 for where in homes.values())
    assert moved <= len(homes) // 10


@pytest.mark.parametrize("num_instances", [3, 8])
def test_questions_to_one_document_end_up_on_every_instance(num_instances: int) -> None:
    """Nearly all of each prompt is at its first holder, and still that one must not get them all."""
    fleet, document = Fleet(num_instances), pages("d", 30)
    for i in range(100 * num_instances):
        fleet.place(f"warm{i}", document + pages(f"w{i}.", 1))
    counts = Counter(fleet.place(f"q{i}", document + pages(f"q{i}.", 1)) for i in range(100 * num_instances))
    assert len(counts) == num_instances
    assert max(counts.values()) <= 1.3 * 100


def test_a_burst_of_one_prefix_lands_together_before_the_first_has_answered() -> None:
    fleet, chain = Fleet(4), pages("b", 20)
    where = [fleet.place(f"r{i}", chain, ends=False) for i in range(3)]
    assert len(set(where)) == 1


def test_after_a_death_nothing_is_sent_to_pages_that_are_gone() -> None:
    fleet, chain = Fleet(3), pages("c", 12)
    home = fleet.place("r1", chain)
    fleet.index.purge(home)
    fleet.memory.purge(home)
    found = fleet.index.match(chain)
    assert found == {}
    assert all(fleet.memory.matched(n, chain, found.get(n, ())) == () for n in fleet.names)
