"""A prefix that a peer has is fetched where that is known to be cheaper than computing it, and only there."""

from __future__ import annotations

import msgspec
import pytest

from tests.null.service.conftest import House, byte_ids, collect, say, tokens_of, turns
from tests.null.service.handover.conftest import Pair, finish, kinds, make_pair, submits
from xllm.cost import StepCost, TransferCost
from xllm.prefix import page_digest, root_digest
from xllm.service.handover.fetch import MAX_FETCHES, plan_fetch
from xllm.service.live import LiveRequest
from xllm.types import PAGE_SIZE, EngineSnapshot
from xllm.wire.messages import CancelTransfer, Fetch, KvDelta, Submit

COST = StepCost((1.0, 0.1, 0.0, 1.0, 0.0))
"""A page takes 6.4 ms to compute."""
FAST = TransferCost(latency_ms=1.0, bytes_per_ms=1000.0)
"""A page of 1000 bytes takes 1 ms to move."""
SLOW = TransferCost(latency_ms=1.0, bytes_per_ms=100.0)
CHAIN = tuple(bytes([i]) * 16 for i in range(10))
PROMPT = "p" * (4 * PAGE_SIZE + 5)


@pytest.mark.parametrize(
    ("num_own", "peers", "num_tokens", "page_bytes", "cost", "expected"),
    [
        pytest.param(0, {"a": (8, FAST)}, 700, 1000, COST, ("a", 0, 8), id="cheaper"),
        pytest.param(3, {"a": (8, FAST)}, 700, 1000, COST, ("a", 3, 8), id="what is lacking"),
        pytest.param(0, {"a": (8, SLOW)}, 700, 1000, COST, None, id="a slow link"),
        pytest.param(0, {"a": (8, SLOW), "b": (5, FAST)}, 700, 1000, COST, ("b", 0, 5), id="the better"),
        pytest.param(0, {"a": (5, FAST), "b": (8, FAST)}, 700, 1000, COST, ("b", 0, 8), id="the longer"),
        pytest.param(0, {"a": (10, FAST)}, 640, 1000, COST, ("a", 0, 9), id="the last row is computed"),
        pytest.param(7, {"a": (8, FAST)}, 700, 1000, COST, None, id="one page is not worth it"),
        pytest.param(8, {"a": (8, FAST)}, 700, 1000, COST, None, id="nothing more"),
        pytest.param(0, {}, 700, 1000, COST, None, id="nobody"),
        pytest.param(0, {"a": (8, FAST)}, 700, 0, COST, None, id="unknown size"),
        pytest.param(0, {"a": (8, FAST)}, 700, 1000, None, None, id="unknown cost"),
        pytest.param(0, {"a": (99, FAST)}, 10_000, 1000, COST, ("a", 0, 10), id="no further than the chain"),
    ],
)
def test_what_is_fetched_from_whom(
    num_own: int,
    peers: dict[str, tuple[int, TransferCost]],
    num_tokens: int,
    page_bytes: int,
    cost: StepCost | None,
    expected: tuple[str, int, int] | None,
) -> None:
    plan = plan_fetch(
        num_tokens=num_tokens,
        num_own=num_own,
        root=b"root",
        chain=CHAIN,
        peers=peers,
        page_bytes=page_bytes,
        cost=cost,
    )
    if expected is None:
        assert plan is None
        return
    source, first, end = expected
    assert plan is not None
    assert (plan.source, plan.digests) == (source, CHAIN[first:end])
    assert plan.root == (CHAIN[first - 1] if first else b"root")
    assert plan.fetch_ms < plan.compute_ms


# -- at the front -------------------------------------------------------------------------------------------


async def test_the_instance_is_told_where_to_fetch_before_it_gets_the_request(house: House) -> None:
    pair = await holding(house)
    stream = await pair.started(prompt=PROMPT)
    assert kinds(pair.p, Fetch, Submit) == ["Fetch", "Submit"]
    (fetch,) = await pair.p.saw(Fetch)
    assert isinstance(fetch, Fetch)
    assert fetch.transfer_id == submits(pair.p)[0].transfer_id
    assert fetch.digests == pages(PROMPT)
    assert fetch.root == root_digest("sample", None, "")
    assert fetch.sources == ("unix:/run/p", "tcp:127.0.0.1:9")
    assert house.front.snapshot().num_prefix_fetches == 1
    await ended(pair, stream)


async def test_a_client_that_leaves_cancels_the_fetch(house: House) -> None:
    pair = await holding(house)
    stream = await pair.started(prompt=PROMPT)
    stream.leave()
    cancelled = await pair.p.saw(CancelTransfer, 2)
    (fetch,) = await pair.p.saw(Fetch)
    assert fetch.transfer_id in {m.transfer_id for m in cancelled}  # type: ignore[union-attr]


async def test_fetches_to_one_instance_are_bounded(house: House) -> None:
    pair = await holding(house)
    streams = [await pair.started(prompt=PROMPT) for _ in range(MAX_FETCHES + 2)]
    assert len(kinds(pair.p, Fetch)) == MAX_FETCHES
    await finish(pair.p, pair.d, streams=tuple(streams))
    again = await pair.started(prompt=PROMPT)
    assert len(kinds(pair.p, Fetch)) == MAX_FETCHES + 1
    await ended(pair, again)


@pytest.mark.parametrize("what", ["link", "cost", "pages", "logprobs", "numerics"])
async def test_without_knowledge_or_use_nothing_is_fetched(house: House, what: str) -> None:
    pair = await holding(house, without=what)
    params = {"prompt_logprobs": 0} if what == "logprobs" else {}
    stream = await pair.started(prompt=PROMPT, **params)
    assert kinds(pair.p, Fetch) == []
    assert submits(pair.p)[0].transfer_id == ""
    await ended(pair, stream)


async def ended(pair: Pair, stream: LiveRequest) -> None:
    await finish(pair.p, pair.d, streams=(stream,))
    assert tokens_of(await collect(stream)) == (*byte_ids("yes"), 2)


async def holding(house: House, without: str = "") -> Pair:
    """d holds the pages of PROMPT, p is where prompts go; everything is known but what is named."""
    pair = await make_pair(house, script=say("yes"))
    for instance in house.front._catalogue.instances():
        instance.card = msgspec.structs.replace(instance.card, page_bytes=1000)
        if without != "cost":
            instance.snapshot = EngineSnapshot(cost=COST.coefficients)
        if without == "numerics" and instance.name == "d":
            instance.card = msgspec.structs.replace(instance.card, kv_layout_digest="other")
    if without != "link":
        for num in (1, 2, 3, 4):
            house.front._links.observe("d", "p", num * 1000, FAST.transfer_ms(num * 1000))
    if without != "pages":
        pair.d.tell(KvDelta(seq=0, stored=pages(PROMPT), reset=True))
        await turns(lambda: house.front.kv_index.num_pages("d") == 4)
    # The engine's own next word says nothing of costs.
    pair.p.snapshot = lambda: EngineSnapshot(cost=() if without == "cost" else COST.coefficients)  # type: ignore[method-assign]
    return pair


def pages(prompt: str) -> tuple[bytes, ...]:
    digest, chain = root_digest("sample", None, ""), []
    ids = byte_ids(prompt)
    for start in range(0, len(ids) - PAGE_SIZE + 1, PAGE_SIZE):
        digest = page_digest(digest, ids[start : start + PAGE_SIZE])
        chain.append(digest)
    return tuple(chain)
