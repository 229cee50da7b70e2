"""What moves between the engines of one simulated run: the wires, who is handed over, and when.

Plain values drawn from the schedule's seed, and the placement that hands everybody over.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from xllm.config import FrontConfig
from xllm.service.router.base import Placement, RequestView, RouterPolicy, RouterSnapshot
from xllm.simulation.network import Wire

PAGE_BYTES = 1_000_000
"""What a page weighs on the wire; what it holds is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimMove:
    """Once its client has read so many deltas, a request (by its index) is to go on at another instance."""

    after: int
    request: int
    instance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOvers:
    """`everyone`: each request decodes elsewhere than where its prompt is computed."""

    wire: Wire
    mode: Literal["push", "pull"] = "push"
    everyone: bool = False
    moves: tuple[SimMove, ...] = ()

    def describe(self) -> str:
        page_ms = 1000 * PAGE_BYTES / self.wire.bytes_per_s
        sides = "one-sided" if self.wire.one_sided else "two-sided"
        who = ", everyone is handed over" if self.everyone else ""
        return f"{self.mode}, {sides}, {page_ms:g} ms a page{who}"


def draw_hand_overs(rng: random.Random, num_instances: int, num_requests: int) -> HandOvers:
    everyone = rng.random() < 0.6
    num_moves = rng.choice((0, 2, 8)) if everyone else rng.choice((3, 8, 20))
    moves = [
        SimMove(
            after=rng.choice((1, 2, rng.randint(1, 40))),
            request=rng.randrange(num_requests),
            instance=rng.randrange(num_instances),
        )
        for _ in range(num_moves)
    ]
    return HandOvers(
        wire=Wire(
            latency_s=rng.choice((0.00005, 0.0005, 0.005)),
            bytes_per_s=PAGE_BYTES / rng.choice((0.0001, 0.001, 0.02, 0.2)),
            one_sided=rng.random() < 0.6,
        ),
        mode=rng.choice(("push", "push", "pull")),
        everyone=everyone,
        moves=tuple(sorted(moves, key=lambda m: (m.request, m.after, m.instance))),
    )


def elsewhere(policy: RouterPolicy) -> RouterPolicy:
    """The policy's own placement; decoding goes to the next instance by name."""

    def place(request: RequestView, snapshot: RouterSnapshot, config: FrontConfig) -> Placement | None:
        placement = policy(request, snapshot, config)
        names = [view.name for view in snapshot.instances]
        if placement is None or len(names) == 1:
            return placement
        following = names[(names.index(placement.instance) + 1) % len(names)]
        return replace(placement, decode=following)

    return place
