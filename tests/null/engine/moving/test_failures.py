"""Transfers that fail, are cancelled or disturbed at every stage: nothing is lost, nobody waits for ever."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from tests.null.engine.moving.harness import Pair
from tests.null.engine.moving.test_moves import PROMPT, request, same, unmoved
from xllm.config import SchedulerConfig
from xllm.engine.kvtransfer.base import Arrived, Manifest, Offered
from xllm.testing.null_engine import FULL, WINDOW, null_engine, spec
from xllm.wire.messages import Move


def decoding(kind: str = "greedy", count: int = 3, **pair: object):
    made = Pair(**pair)
    client = made.submit(request(kind, ignore_eos=True))
    made.until(lambda: len(client.tokens.get(0, ())) >= count)
    return made, client


@pytest.mark.parametrize("kind", ["greedy", "two"])
@pytest.mark.parametrize("num_done", range(9))
def test_a_cut_after_any_number_of_things_done(kind: str, num_done: int) -> None:
    pair, client = decoding(kind)
    pair.pages_per_turn = 0
    name = pair.move("a")
    pair.wire.run(num_done)
    pair.hand_on()
    pair.turn()
    assert pair.wire.cut(name)
    pair.pages_per_turn = None
    pair.until(lambda: bool(pair.moved))
    assert pair.moved[0].error is not None
    assert client.at == 0
    pair.finish()
    same(client, unmoved(request(kind, ignore_eos=True)))


def test_a_corrupt_transfer_is_answered_and_the_request_goes_on() -> None:
    pair, client = decoding()
    pair.wire.corrupt.add(pair.move("a"))
    pair.finish()
    assert [m.error is None for m in pair.moved] == [False]
    assert pair.wire.num_copied > 0
    same(client, unmoved(request("greedy", ignore_eos=True)))


def test_nobody_at_the_endpoints_is_an_answer() -> None:
    pair, client = decoding()
    transfers = pair.engines[1].transfers
    assert transfers is not None
    transfers.close()
    pair.move("a")
    pair.finish()
    assert [m.error.code for m in pair.moved if m.error] == ["unreachable"]
    same(client, unmoved(request("greedy", ignore_eos=True)))


@pytest.mark.parametrize("turns", range(5))
@pytest.mark.parametrize("side", [0, 1])
def test_cancelled_by_the_front_on_either_side(turns: int, side: int) -> None:
    pair, client = decoding()
    pair.pages_per_turn = 2
    name = pair.move("a")
    for _ in range(turns):
        pair.turn()
    moved_before = client.at == 1
    pair.engines[side].core.mover.cancel(name)
    pair.pages_per_turn = None
    pair.finish()
    assert len(pair.moved) == 1
    assert (pair.moved[0].error is None) == (client.at == 1)
    assert client.at == 1 or not moved_before
    same(client, unmoved(request("greedy", ignore_eos=True)))


def test_a_success_may_be_taken_back() -> None:
    pair, client = decoding()
    name = pair.move("a")
    pair.switch = lambda moved: None  # type: ignore[method-assign]
    pair.until(lambda: bool(pair.moved))
    count = len(client.tokens[0])
    for _ in range(3):
        pair.turn()
    assert len(client.tokens[0]) == count
    for engine in pair.engines:
        engine.core.mover.cancel(name)
    pair.finish()
    assert client.at == 0
    same(client, unmoved(request("greedy", ignore_eos=True)))


def test_the_client_leaves_while_it_moves() -> None:
    pair, _ = decoding("two")
    pair.pages_per_turn = 1
    pair.move("a")
    pair.turn()
    pair.engines[0].core.abort("a")
    pair.finish()
    assert [m.error.code for m in pair.moved if m.error] == ["request_ended"]


def test_the_front_is_gone_while_a_request_waits_for_its_pages() -> None:
    pair, client = decoding()
    pair.pages_per_turn = 0
    name = pair.move("a")
    pair.wire.run(2)
    pair.hand_on()
    pair.turn()
    there = pair.engines[1]
    there.core.submit(client.next_spec(), owner=5, transfer_id=name)
    assert there.core.snapshot().transfer_pages > 0
    there.core.step()
    assert there.core.snapshot().num_waiting == 1
    there.core.abort_all(5)
    there.core.step()
    pair.pages_per_turn = None
    pair.finish()
    assert client.at == 0


def test_a_request_waits_for_its_pages_and_no_longer_than_it_may() -> None:
    pair, client = decoding()
    pair.pages_per_turn = 0
    name = pair.move("a")
    pair.wire.run(3)
    pair.hand_on()
    there = pair.engines[1]
    there.core.submit(msgspec.structs.replace(client.next_spec(), request_id="b"), transfer_id=name)
    for _ in range(3):
        assert there.core.advance() is False
    there.clock.advance(5.1)
    assert there.core.advance() is True
    assert there.core.snapshot().transfer_pages > 0  # the sender may still write them
    assert there.core.snapshot().prompt_tokens > 0
    there.core.abort("b")
    pair.wire.run()
    pair.hand_on()
    assert there.core.snapshot().transfer_pages == 0
    pair.pages_per_turn = None
    pair.finish()


def test_what_nobody_claims_is_thrown_away() -> None:
    pair, client = decoding()
    pair.switch = lambda moved: None  # type: ignore[method-assign]
    pair.move("a")
    pair.until(lambda: bool(pair.moved))
    there = pair.engines[1]
    assert there.core.snapshot().transfer_pages > 0
    there.clock.advance(9.0)
    there.core.advance()
    assert there.core.snapshot().transfer_pages > 0
    there.clock.advance(1.1)
    there.core.advance()
    assert there.core.snapshot().transfer_pages == 0
    assert client.at == 0
    pair.engines[0].core.abort("a")
    pair.settle()


def test_preempted_while_it_is_copied_it_is_answered_and_goes_on() -> None:
    pair, client = decoding("two")
    pair.pages_per_turn = 0
    pair.move("a")
    pair.turn()
    assert pair.engines[0].core.scheduler.preempt_all() == 2
    pair.pages_per_turn = None
    pair.finish()
    assert [m.error.code for m in pair.moved if m.error] == ["preempted"]
    same(client, unmoved(request("two", ignore_eos=True)))


def test_preempted_while_it_holds_still_it_arrives_all_the_same() -> None:
    pair, client = decoding()
    pair.pages_per_turn = 0
    pair.move("a")
    pair.wire.run()
    pair.hand_on()
    pair.wire.run(1)
    pair.turn()
    pair.wire.run()
    pair.hand_on()
    pair.engines[0].core.advance()
    assert pair.wire.flows["t0"].manifest is not None
    assert pair.engines[0].core.scheduler.preempt_all() == 1
    pair.pages_per_turn = None
    pair.finish()
    assert client.at == 1
    assert [m.error for m in pair.moved] == [None]
    same(client, unmoved(request("greedy", ignore_eos=True)))


def test_without_room_it_is_refused_by_name() -> None:
    pair, client = decoding()
    there = pair.engines[1]
    there.core.submit(spec("big", PROMPT, max_tokens=1500, ignore_eos=True, n=5, temperature=1.0))
    for _ in range(1000):
        if there.memory.counts().free + there.memory.counts().reusable < 5:
            break
        there.step()
    else:
        raise AssertionError("it never filled up")
    pair.move("a")
    pair.engines[0].core.advance()
    pair.wire.run()
    pair.hand_on()
    pair.wire.run()
    pair.hand_on()
    ((_, moved),) = pair.engines[0].core.mover.take_answers()
    assert moved.error is not None
    assert moved.error.code == "no_room"
    there.core.abort("big")
    pair.finish()
    assert client.at == 0


def test_a_draining_engine_takes_nothing_over() -> None:
    pair, _ = decoding()
    pair.engines[1].core.drain()
    pair.move("a")
    pair.finish()
    assert [m.error.code for m in pair.moved if m.error] == ["draining"]


@pytest.mark.parametrize("wrong", ["id", "attempt", "twice"])
def test_a_move_of_what_is_not_there_is_answered(wrong: str) -> None:
    pair, _ = decoding()
    mover = pair.engines[0].core.mover
    pair.pages_per_turn = 0
    if wrong == "twice":
        pair.move("a")
    mover.move(
        0,
        Move(
            request_id="b" if wrong == "id" else "a",
            attempt=int(wrong == "attempt"),
            transfer_id="other",
            endpoints=("fake:1",),
        ),
        0.0,
    )
    ((_, moved),) = mover.take_answers()
    assert moved.transfer_id == "other"
    assert moved.error is not None
    assert moved.error.code == ("already_moving" if wrong == "twice" else "not_here")
    pair.pages_per_turn = None
    pair.finish()


def test_without_transfers_every_move_is_refused_and_every_pull_computed() -> None:
    engine = null_engine()
    engine.core.submit(request("greedy"), transfer_id="t", sources=("fake:9",))
    engine.core.mover.move(0, Move(request_id="a", attempt=0, transfer_id="u", endpoints=("fake:9",)), 0.0)
    frames = engine.run()
    ((_, moved),) = engine.core.mover.take_answers()
    assert moved.error is not None
    assert moved.error.code == "no_transfer"
    assert [t for f in frames for t in f.tokens] == unmoved(request("greedy")).tokens[0]


# -- what a peer says is compared with what the front asked for ------------------------------------


def arrive(pair: Pair, client, change) -> None:
    """Let everything arrive on the second engine, with a manifest that `change` has altered."""

    def alter(event):
        if isinstance(event, Arrived):
            altered.append(event)
            return dataclasses.replace(event, manifest=change(event.manifest))
        return event

    altered: list[Arrived] = []
    pair.alter = alter
    pair.switch = lambda moved: None  # type: ignore[method-assign]
    pair.move("a")
    pair.until(lambda: bool(pair.moved))
    assert altered
    go_on(pair, client)


def go_on(pair: Pair, client) -> None:
    """What `Pair.switch` does, for the transfer t1."""
    pair.engines[0].core.abort("a")
    client.spec = client.next_spec()
    client.at, client.attempt = 1, client.spec.attempt
    pair.engines[1].core.submit(client.spec, transfer_id="t0")


def first(manifest: Manifest, **fields: object) -> Manifest:
    changed = dataclasses.replace(manifest.choices[0], **fields)
    return dataclasses.replace(manifest, choices=(changed, *manifest.choices[1:]))


CHANGES = {
    "other tokens": lambda m: first(m, tokens=(1, *m.choices[0].tokens[1:])),
    "other last token": lambda m: first(m, tokens=(*m.choices[0].tokens[:-1], 5)),
    "fewer pages": lambda m: first(m, pages=tuple(g[:-1] for g in m.choices[0].pages)),
    "no group": lambda m: first(m, pages=()),
    "wild index": lambda m: first(m, pages=tuple((9999, *g[1:]) for g in m.choices[0].pages)),
    "negative index": lambda m: first(m, pages=tuple((*g[:-1], -7) for g in m.choices[0].pages)),
    "one page twice": lambda m: first(m, pages=tuple((g[-1],) * len(g) for g in m.choices[0].pages)),
    "no choices": lambda m: dataclasses.replace(m, choices=()),
    "nothing computed": lambda m: first(m, num_computed=0),
    "more computed than tokens": lambda m: first(m, num_computed=10**9),
    "other choice": lambda m: first(m, choice=7),
    "shared partial page": lambda m: dataclasses.replace(
        m,
        choices=tuple(dataclasses.replace(c, pages=m.choices[0].pages) for c in m.choices),
    ),
}


STILL_USED = ("other last token", "more computed than tokens", "shared partial page")
"""The last token's row is computed anyway; of choices that share too much the full pages are used."""


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "window"])
def test_a_manifest_that_does_not_fit_costs_work_and_nothing_else(name: str, groups) -> None:
    kind = "two" if name == "shared partial page" else "greedy"
    # 208 tokens are computed when it moves: 3 full pages and a partial one.
    pair, client = decoding(kind, count=8, groups=groups)
    arrive(pair, client, CHANGES[name])
    if name not in STILL_USED:
        assert pair.engines[1].core.mover.counters.claimed_rows == 0
    pair.finish()
    same(client, unmoved(request(kind, ignore_eos=True), groups=groups))


def test_a_manifest_ahead_of_the_log_is_used_as_far_as_the_log_goes() -> None:
    pair, client = decoding(count=8)
    pair.switch = lambda moved: None  # type: ignore[method-assign]
    pair.move("a")
    pair.until(lambda: bool(pair.moved))
    client.tokens[0] = client.tokens[0][:-3]
    go_on(pair, client)
    assert pair.engines[1].core.mover.counters.claimed_rows == len(PROMPT) + len(client.tokens[0]) - 1
    pair.finish()
    same(client, unmoved(request("greedy", ignore_eos=True)))


def test_pages_read_while_a_step_was_computed_twice_are_not_used() -> None:
    """The fault of another request makes the executor run the step again, which empties new pages first."""
    pair = Pair(config=SchedulerConfig(max_num_batched_tokens=128))
    client = pair.submit(request("greedy"))
    pair.engines[0].core.submit(spec("bad", (1, 2, 3), max_tokens=9))

    def fault(entry) -> None:
        if len(entry.tokens) == 3:
            raise RuntimeError("the fault")

    pair.engines[0].runner.fault = fault
    pair.move("a")
    pair.finish()
    assert [m.error.code for m in pair.moved if m.error] == ["step_failed"]
    same(client, unmoved(request("greedy")))


@pytest.mark.parametrize("kind", ["greedy", "two"])
def test_everything_arrived_and_no_token_was_delivered(kind: str) -> None:
    """The sender died after its pages had left and before the client had a token: nothing is computed twice
    but the row that yields the first token."""
    pair = Pair()
    client = pair.submit(request(kind))
    pair.switch = lambda moved: None  # type: ignore[method-assign]
    pair.move("a")
    pair.until(lambda: bool(pair.moved))
    client.tokens, client.logprobs = {}, {}
    go_on(pair, client)
    assert pair.engines[1].core.mover.counters.claimed_rows == len(PROMPT) - 1
    pair.finish()
    same(client, unmoved(request(kind)))


def test_the_same_offer_twice_is_taken_once() -> None:
    pair, _ = decoding()
    pair.pages_per_turn = 0
    pair.move("a")
    pair.wire.run(1)
    pair.hand_on()
    before = pair.engines[1].core.snapshot().transfer_pages
    pair.engines[1].core.on_event(Offered(transfer_id="t0", num_pages=(4,)))
    assert pair.engines[1].core.snapshot().transfer_pages == before
    pair.pages_per_turn = None
    pair.finish()


def test_a_request_that_grows_into_little_memory_is_not_starved_by_moves() -> None:
    """Pages are short on the sender while it copies: everybody ends, whoever is preempted."""
    pair = Pair(num_pages=12, config=SchedulerConfig(max_num_seqs=4))
    clients = []
    for name in ("a", "b", "c"):
        of = spec(name, tuple(t + ord(name) for t in PROMPT[:120]), max_tokens=150, ignore_eos=True)
        clients.append((pair.submit(of), of))
    pair.until(lambda: any(c.tokens.get(0) for c, _ in clients))
    pair.pages_per_turn = 1
    for client, of in clients:
        if client.tokens.get(0):
            pair.move(of.request_id)
    pair.finish()
    for client, of in clients:
        same(client, unmoved(of))
