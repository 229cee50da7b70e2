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
class SimSwitch:
    at_s: float
    instance: int
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOvers:
    """`everyone`: each request decodes elsewhere than where its prompt is computed. `roles` by instance is
    what each starts with (none = all mixed); `switches` give another one, at their time, if floors allow."""

    wire: Wire
    mode: Literal["push", "pull"] = "push"
    everyone: bool = False
    moves: tuple[SimMove, ...] = ()
    roles: tuple[str, ...] = ()
    switches: tuple[SimSwitch, ...] = ()
    adaptive: bool = False

    def describe(self) -> str:
        page_ms = 1000 * PAGE_BYTES / self.wire.bytes_per_s
        sides = "one-sided" if self.wire.one_sided else "two-sided"
        who = ", everyone is handed over" if self.everyone else ""
        roles = f", roles {' '.join(self.roles) or 'all mixed'}{' to be adapted' if self.adaptive else ''}"
        return f"{self.mode}, {sides}, {page_ms:g} ms a page{who}{roles}"


def draw_hand_overs(rng: random.Random, num_instances: int, num_requests: int) -> HandOvers:
    everyone = rng.random() < 0.5
    with_roles = not everyone and rng.random() < 0.7
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
        roles=_roles(rng, num_instances) if with_roles else (),
        switches=_switches(rng, num_instances) if with_roles else (),
        adaptive=with_roles and rng.random() < 0.3,
        moves=tuple(sorted(moves, key=lambda m: (m.request, m.after, m.instance))),
    )


def _roles(rng: random.Random, num_instances: int) -> tuple[str, ...]:
    """Somebody for either phase."""
    roles = ["prefill", "decode", *rng.choices(("prefill", "decode", "mixed"), k=num_instances - 2)]
    rng.shuffle(roles)
    return tuple(roles)


def _switches(rng: random.Random, num_instances: int) -> tuple[SimSwitch, ...]:
    switches = [
        SimSwitch(
            at_s=round(rng.uniform(0.0, 6.0), 4),
            instance=rng.randrange(num_instances),
            role=rng.choice(("prefill", "decode", "mixed")),
        )
        for _ in range(rng.choice((0, 2, 6)))
    ]
    return tuple(sorted(switches, key=lambda s: (s.at_s, s.instance, s.role)))


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
