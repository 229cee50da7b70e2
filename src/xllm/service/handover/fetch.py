"""Whether pages of a prefix that a peer has are fetched instead of computed: by measured numbers only.

Pure. Who has which pages is the index's word, and a wrong one costs time and no correctness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm.cost import StepCost, TransferCost
from xllm.types import PAGE_SIZE

MARGIN = 1.25
"""A fetch must be so much cheaper than computing: it is one more thing that can fail."""
MIN_PAGES = 2
MAX_FETCHES = 4
"""Under way to one instance at a time: beyond that they would wait for each other's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """Pages `first` … of the chain, from `source`. `root` is the parent of the first one."""

    source: str
    first: int
    root: bytes
    digests: tuple[bytes, ...]
    fetch_ms: float
    compute_ms: float

    def __str__(self) -> str:
        return (
            f"fetch {len(self.digests)} pages from {self.source} in {self.fetch_ms:.1f} ms "
            f"(computing them: {self.compute_ms:.1f} ms)"
        )


def plan_fetch(
    *,
    num_tokens: int,
    num_own: int,
    root: bytes,
    chain: Sequence[bytes],
    peers: Mapping[str, tuple[int, TransferCost]],
    page_bytes: int,
    cost: StepCost | None,
) -> FetchPlan | None:
    """The cheapest way to more of the prefix. `num_own` pages are at the instance; `peers` says how many of
    the first ones each peer has, and what the link from it costs. None = computing is as good.

    One row is computed in any case, so a prompt's last token is never fetched.
    """
    if cost is None or page_bytes <= 0:
        return None
    most = min(len(chain), max(0, num_tokens - 1) // PAGE_SIZE)
    best: FetchPlan | None = None
    for name, (num_pages, link) in sorted(peers.items()):
        end = min(num_pages, most)
        if end - num_own < MIN_PAGES:
            continue
        fetch_ms = link.transfer_ms((end - num_own) * page_bytes)
        compute_ms = cost.prefill_ms(num_tokens, num_own * PAGE_SIZE) - cost.prefill_ms(
            num_tokens, end * PAGE_SIZE
        )
        if fetch_ms * MARGIN >= compute_ms:
            continue
        if best is None or compute_ms - fetch_ms > best.compute_ms - best.fetch_ms:
            best = FetchPlan(
                source=name,
                first=num_own,
                root=chain[num_own - 1] if num_own else root,
                digests=tuple(chain[num_own:end]),
                fetch_ms=fetch_ms,
                compute_ms=compute_ms,
            )
    return best
