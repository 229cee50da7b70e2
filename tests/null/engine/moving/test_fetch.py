"""A prefix that a peer has cached is fetched, compared and used like one of our own."""

from __future__ import annotations

import dataclasses

import pytest

from tests.null.engine.moving.harness import Client, Pair
from tests.null.engine.moving.test_moves import PROMPT, request, same, unmoved
from xllm.engine.kvtransfer.base import Arrived
from xllm.engine.memory.leases import chain_keys
from xllm.prefix import root_digest
from xllm.testing.null_engine import FULL, WINDOW, spec
from xllm.types import PAGE_SIZE
from xllm.wire.messages import Fetch

ROOT = root_digest("null", None, "")
KEYS = chain_keys(ROOT, PROMPT)


def warm(groups=(FULL,)) -> Pair:
    """The first engine has the prompt in its cache."""
    pair = Pair(groups=groups)
    pair.submit(request("greedy"))
    pair.finish()
    return pair


def fetch(pair: Pair, first: int = 0, digests: tuple[bytes, ...] | None = None) -> None:
    keys = KEYS[first:]
    pair.engines[1].core.mover.fetch(
        Fetch(
            transfer_id="f",
            sources=("fake:0",),
            root=keys[0].parent,
            digests=tuple(k.digest for k in keys) if digests is None else digests,
        )
    )


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW), (WINDOW,)], ids=["full", "both", "window"])
@pytest.mark.parametrize("early", [False, True], ids=["arrived before", "waited for"])
def test_a_fetched_prefix_is_a_hit(groups, early: bool) -> None:
    pair = warm(groups)
    fetch(pair)
    if not early:
        for _ in range(4):
            pair.turn()
    assert submit_after_fetch(pair, groups) == len(PROMPT) - len(KEYS) * PAGE_SIZE
    assert pair.engines[1].core.snapshot().prefix_hits == len(KEYS) * PAGE_SIZE


def submit_after_fetch(pair: Pair, groups=(FULL,)) -> int:
    """The request with the fetched prefix ends with its own tokens; prompt tokens computed so far."""
    of = request("seeded")
    client = pair.clients["a"] = Client(of, at=1)
    pair.engines[1].core.submit(of, transfer_id="f")
    pair.finish()
    same(client, unmoved(of, groups=groups))
    return pair.engines[1].core.snapshot().prompt_tokens


def test_only_the_missing_end_of_a_chain_is_fetched() -> None:
    pair = warm()
    pair.engines[1].core.submit(head_of(PAGE_SIZE + 5))
    pair.engines[1].run()
    before = pair.engines[1].core.snapshot().prompt_tokens
    fetch(pair, first=1)
    assert submit_after_fetch(pair) - before == len(PROMPT) - len(KEYS) * PAGE_SIZE
    assert pair.wire.num_copied == len(KEYS) - 1


def head_of(length: int):
    return spec("head", PROMPT[:length], max_tokens=2)


def test_what_the_peer_lost_is_computed() -> None:
    pair = warm()
    pair.engines[0].memory.reset_prefix_cache()
    fetch(pair)
    assert submit_after_fetch(pair) == len(PROMPT)
    assert pair.wire.num_copied == 0


def test_a_peer_that_gives_other_tokens_is_not_believed() -> None:
    pair = warm()

    def alter(event):
        if not isinstance(event, Arrived):
            return event
        changed = dataclasses.replace(event.manifest.choices[0], tokens=(1,) * (len(KEYS) * PAGE_SIZE))
        return dataclasses.replace(event, manifest=dataclasses.replace(event.manifest, choices=(changed,)))

    pair.alter = alter
    fetch(pair)
    assert submit_after_fetch(pair) == len(PROMPT)
    assert pair.wire.num_copied == len(KEYS)


def test_pages_that_are_given_are_not_evicted_meanwhile() -> None:
    pair = warm()
    pair.pages_per_turn = 0
    fetch(pair)
    pair.wire.run(1)
    pair.hand_on()
    here = pair.engines[0]
    assert here.core.snapshot().transfer_pages == len(KEYS)
    here.core.submit(head_of(200))
    here.run()
    here.memory.reset_prefix_cache()
    assert here.core.snapshot().transfer_pages == len(KEYS)
    pair.pages_per_turn = None
    assert submit_after_fetch(pair) == len(PROMPT) - len(KEYS) * PAGE_SIZE
