"""Fetches of prefix pages between engines, as the front orders them: decided by `fetch`, bounded here.

A fetch is a hint to the engine that gets the request: whatever becomes of it, the request is computed.
"""

from __future__ import annotations

import logging

from xllm.cost import StepCost, TransferCost
from xllm.ids import new_transfer_id
from xllm.service.catalogue import Catalogue
from xllm.service.handover.fetch import MAX_FETCHES, FetchPlan, plan_fetch
from xllm.service.handover.links import Links
from xllm.service.handover.pair import why_not
from xllm.service.instances.instance import Instance
from xllm.service.placer import Choice
from xllm.types import RequestSpec
from xllm.wire.messages import CancelTransfer, Fetch

decisions = logging.getLogger("xllm.decisions")


class Prefixes:
    """`order` posts the Fetch that a Submit with the same transfer id must follow at once."""

    def __init__(self, catalogue: Catalogue, links: Links) -> None:
        self.num_fetches = 0
        self._catalogue = catalogue
        self._links = links
        self._under_way: dict[str, tuple[Instance, str]] = {}

    def order(self, spec: RequestSpec, choice: Choice, num_tokens: int) -> str:
        """The transfer's id, or "" where computing is as good or nothing is known."""
        plan = self._plan(spec, choice, num_tokens)
        source = None if plan is None else self._catalogue.get(plan.source)
        if plan is None or source is None:
            return ""
        transfer_id = new_transfer_id()
        self.num_fetches += 1
        self._under_way[spec.request_id] = (choice.instance, transfer_id)
        choice.instance.post(
            Fetch(
                transfer_id=transfer_id,
                sources=source.about.endpoints,
                root=plan.root,
                digests=plan.digests,
            )
        )
        decisions.info("request %s at %s: %s", spec.request_id, choice.instance.name, plan)
        return transfer_id

    def answered(self, request_id: str) -> None:
        self._under_way.pop(request_id, None)

    def left(self, request_id: str) -> None:
        """It has left its instance, perhaps before the pages were there."""
        under_way = self._under_way.pop(request_id, None)
        if under_way is not None:
            under_way[0].post(CancelTransfer(transfer_id=under_way[1]))

    def _plan(self, spec: RequestSpec, choice: Choice, num_tokens: int) -> FetchPlan | None:
        instance = choice.instance
        own = choice.holders.get(instance.name, 0)
        if max(choice.holders.values(), default=0) <= own or not instance.about.endpoints:
            return None
        # Whoever wants every row of the prompt computed reads no page.
        if spec.params.skip_reading_prefix_cache or spec.params.prompt_logprobs is not None:
            return None
        if sum(target is instance for target, _ in self._under_way.values()) >= MAX_FETCHES:
            return None
        return plan_fetch(
            num_tokens=num_tokens,
            num_own=own,
            root=choice.root,
            chain=choice.chain,
            peers=self._peers(instance, choice),
            page_bytes=instance.card.page_bytes,
            cost=StepCost.known(instance.snapshot.cost),
        )

    def _peers(self, instance: Instance, choice: Choice) -> dict[str, tuple[int, TransferCost]]:
        """Who has pages, can be reached, and how fast: nothing is assumed, a guess costs a client's time."""
        peers: dict[str, tuple[int, TransferCost]] = {}
        for name, num_pages in choice.holders.items():
            peer = self._catalogue.get(name)
            link = self._links.known(name, instance.name)
            if peer is not None and link is not None and not why_not(peer, instance):
                peers[name] = (num_pages, link)
        return peers
