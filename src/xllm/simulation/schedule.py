"""What happens in one simulated run: requests, their readers, and faults, all drawn from one seed.

Plain values, so that a failing schedule can be printed, shrunk and run again. Nothing runs here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from xllm.config import FrontConfig, SchedulerConfig
from xllm.cost import StepCost
from xllm.simulation.device import EOS, FULL, POISON, VOCAB_SIZE, WINDOW
from xllm.simulation.hand_over import HandOvers, draw_hand_overs
from xllm.types import KVGroup, RequestClass, SamplingParams

Habit = Literal["read", "slow", "leave", "abort", "stall"]
"""A client reads on, pauses after each delta, goes away, has its request aborted, or stops reading."""

FaultKind = Literal[
    "crash", "stop", "hang", "slow", "cut", "delay", "repeat", "drain", "wall_jump",
    "link_cut", "link_stall", "link_mute", "link_corrupt", "link_slow", "link_repeat", "part",
    "crash_sender", "crash_receiver", "stop_sender", "stop_receiver",
]  # fmt: skip
"""crash: kill -9. stop: SIGSTOP, later SIGCONT. hang: a step that does not end, while the process lives.

link_…: of the next transfer, whoever begins it (`network.LinkFault`; mute = the answers are lost). part:
nothing passes between the instance and the next one. …_sender, …_receiver: crash or stop of an end of the
next transfer, while it goes on or just behind it.
"""

KINDS: tuple[FaultKind, ...] = (
    "crash", "stop", "hang", "slow", "cut", "delay", "repeat", "drain", "wall_jump",
)  # fmt: skip
WEIGHTS = (30, 16, 12, 10, 10, 6, 6, 6, 4)
LINK_KINDS: tuple[FaultKind, ...] = (
    "link_cut", "link_stall", "link_mute", "link_corrupt", "link_slow", "link_repeat", "part",
    "crash_sender", "crash_receiver", "stop_sender", "stop_receiver",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """One client. `pause_s` and `after` (deltas read) belong to its habit."""

    at_s: float
    prompt: tuple[int, ...]
    params: SamplingParams
    deadline_ms: float | None = None
    priority: int = 0
    cls: RequestClass = "online"
    cache_salt: str = ""
    habit: Habit = "read"
    after: int = 0
    pause_s: float = 0.0

    @property
    def is_poison(self) -> bool:
        return self.prompt[0] == POISON


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`lasts_s`: until it passes, or until a new process is there; None = for ever (a crash without restart).

    `amount` is the factor of a slow engine, the seconds of a delay or a jump, how many messages repeat, or
    the share of a transfer that has been copied before; what exceeds 1 is seconds after its last byte.
    """

    at_s: float
    kind: FaultKind
    instance: int
    lasts_s: float | None = 1.0
    amount: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`starts_s`: when each instance joins. `servers` outlive their front; others end with it. Without
    `hand_overs` no engine exchanges pages."""

    seed: int
    servers: bool
    starts_s: tuple[float, ...]
    num_pages: int
    groups: tuple[KVGroup, ...]
    scheduler: SchedulerConfig
    step_time: StepCost
    latency_s: float
    front: FrontConfig
    requests: tuple[SimRequest, ...]
    faults: tuple[Fault, ...]
    hand_overs: HandOvers | None = None

    @property
    def last_event_s(self) -> float:
        ends = [f.at_s + (f.lasts_s or 0.0) for f in self.faults]
        return max([*self.starts_s, *(r.at_s for r in self.requests), *ends])


POLICIES = ("round-robin", "least-load", "cache-aware", "slo-aware")


def make_schedule(seed: int) -> Schedule:
    """The schedule of a seed: every number in it is drawn from that."""
    schedule = _without_hand_overs(seed)
    if random.Random(f"lookahead of {seed}").random() < 0.5:
        schedule = replace(schedule, scheduler=replace(schedule.scheduler, async_scheduling="on"))
    # Their own source, so that what a seed meant before there were hand-overs has not changed.
    rng = random.Random(f"hand-overs of {seed}")
    num_instances = len(schedule.starts_s)
    if num_instances == 1 or rng.random() < 0.4:
        return schedule
    faults = (*schedule.faults, *_link_faults(rng, num_instances))
    hand_overs = draw_hand_overs(rng, num_instances, len(schedule.requests))
    return replace(
        schedule,
        hand_overs=hand_overs,
        front=replace(
            schedule.front,
            transfer_mode=hand_overs.mode,
            role_control="adaptive" if hand_overs.adaptive else "static",
            role_period_s=0.5,
        ),
        faults=tuple(sorted(faults, key=_order)),
    )


def _without_hand_overs(seed: int) -> Schedule:
    rng = random.Random(seed)
    num_instances = rng.choice((1, 2, 2, 3, 3, 4))
    late = [rng.random() < 0.1 for _ in range(num_instances)]
    starts = tuple(round(rng.uniform(0.1, 2.0), 3) if is_late else 0.0 for is_late in late)
    chunked = rng.random() < 0.85
    servers = rng.random() < 0.4
    return Schedule(
        seed=seed,
        servers=servers,
        starts_s=starts,
        num_pages=rng.choice((8, 10, 14, 24)),
        groups=rng.choice(((FULL,), (FULL,), (FULL, WINDOW))),
        scheduler=SchedulerConfig(
            max_num_seqs=rng.choice((2, 4, 8)),
            max_num_batched_tokens=rng.choice((32, 64, 128)),
            enable_chunked_prefill=chunked,
            scheduling_policy=rng.choice(("fcfs", "fcfs", "priority")),
            max_num_queued_reqs=rng.choice((4, 64)),
        ),
        step_time=StepCost((rng.choice((2.0, 20.0, 60.0)), 0.1, 0.0002, 0.15, 0.0005)),
        latency_s=rng.choice((0.00005, 0.0005, 0.005)),
        front=FrontConfig(
            router_policy=rng.choice(POLICIES),
            stream_buffer_tokens=rng.choice((8, 32, 4096)),
            max_resumes=rng.choice((1, 2, 8)),
            # Whom admission turns away by its predictions is its own tests' matter.
            max_queue_delay_s=0.0,
            max_kv_oversubscription=1000.0,
        ),
        requests=_requests(rng),
        faults=_faults(rng, num_instances, servers),
    )


def _requests(rng: random.Random) -> tuple[SimRequest, ...]:
    prefixes = [_tokens(rng, rng.randint(60, 200)) for _ in range(2)]
    requests = [_request(rng, prefixes) for _ in range(rng.randint(1, 12))]
    if rng.random() < 0.06:
        chosen = rng.randrange(len(requests))
        poisoned = replace(requests[chosen], prompt=(POISON, *requests[chosen].prompt))
        requests[chosen] = poisoned
    return tuple(requests)


def _request(rng: random.Random, prefixes: list[tuple[int, ...]]) -> SimRequest:
    prefix = rng.choice(((), prefixes[0], prefixes[0], prefixes[1]))
    habit: Habit = rng.choices(("read", "slow", "leave", "abort", "stall"), (70, 12, 7, 8, 3))[0]
    return SimRequest(
        at_s=round(rng.choice((0.0, rng.uniform(0, 2.0), rng.uniform(0, 6.0))), 4),
        prompt=prefix + _tokens(rng, rng.randint(1, 60)),
        params=_params(rng),
        deadline_ms=round(rng.uniform(100, 6000), 1) if rng.random() < 0.12 else None,
        priority=rng.choice((0, 0, 0, 1, -1)),
        cls=rng.choice(("online", "online", "offline")),
        cache_salt=rng.choice(("", "", "", "a")),
        habit=habit,
        after=rng.randint(0, 12),
        pause_s=round(rng.uniform(0.01, 0.4), 3),
    )


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, POISON) for _ in range(count))


def _params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice((1, 3, 20, 40, 60))
    fields: dict[str, object] = {
        "n": rng.choice((1, 1, 1, 2, 3)),
        "max_tokens": max_tokens,
        "temperature": rng.choice((0.0, 0.0, 0.8, 1.0)),
        "seed": rng.choice((None, rng.randrange(2**31))),
    }
    options: tuple[dict[str, object], ...] = (
        {},
        {"stop": tuple(rng.sample("etaoinsrhldu", 2))},
        {"stop": ("a",), "include_stop_str_in_output": True, "min_tokens": min(5, max_tokens)},
        {"logprobs": rng.choice((0, 2))},
        {"prompt_logprobs": 1, "logprobs": 1},
        {"min_tokens": min(6, max_tokens), "logit_bias": {EOS: 5.0}},
        {"logit_bias": {EOS: rng.choice((2.0, 4.0))}},
        {"stop_token_ids": tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(30))},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"ignore_eos": True, "logit_bias": {EOS: 3.0}},
        {"bad_words": ("e", "a")},
        {"top_k": 5, "top_p": 0.9},
        {"detokenize": False},
        {"skip_reading_prefix_cache": True},
    )
    for chosen in rng.sample(options, rng.choice((1, 1, 2))):
        fields |= chosen
    return SamplingParams(**fields)  # type: ignore[arg-type]


def _faults(rng: random.Random, num_instances: int, servers: bool) -> tuple[Fault, ...]:
    num_faults = rng.choice((0, 1, 1, 2, 2, 3, 4, 6)) if rng.random() < 0.93 else 14
    faults = [_fault(rng, num_instances, servers) for _ in range(num_faults)]
    if len(faults) > 1 and rng.random() < 0.3:
        # Two at one instant.
        first, second, *rest = faults
        faults = [first, replace(second, at_s=first.at_s), *rest]
    return tuple(sorted(faults, key=_order))


def _order(fault: Fault) -> tuple[float, int, str]:
    return fault.at_s, fault.instance, fault.kind


def _link_faults(rng: random.Random, num_instances: int) -> list[Fault]:
    return [
        Fault(
            at_s=round(rng.choice((0.0, rng.uniform(0, 1.0), rng.uniform(0, 5.0))), 4),
            kind=rng.choice(LINK_KINDS),
            instance=rng.randrange(num_instances),
            lasts_s=rng.choice((0.3, 1.5, 3.0, 15.0)),
            amount=rng.choice((0.0, 0.3, 0.6, 1.0, 1.001, 1.01, 1.1)),
        )
        for _ in range(rng.choice((0, 1, 2, 3, 5)))
    ]


def _fault(rng: random.Random, num_instances: int, servers: bool) -> Fault:
    kind = rng.choices(KINDS, WEIGHTS)[0]
    if kind == "cut" and not servers:
        kind = "crash"  # an inherited socket pair does not break by itself
    lasts: float | None = rng.choice((0.05, 0.5, 1.5, 4.0, 12.0, 20.0))
    amount = 0.0
    if kind in ("crash", "drain", "cut"):
        lasts = rng.choice((0.0, 0.05, 0.5, 3.0, None))
    elif kind == "slow":
        amount = rng.choice((3.0, 10.0, 40.0))
    elif kind == "delay":
        amount = rng.choice((0.02, 0.2, 1.0))
    elif kind == "repeat":
        amount = float(rng.randint(1, 5))
    elif kind == "wall_jump":
        amount = rng.choice((-86_400.0, 3600.0, 86_400.0 * 365))
    return Fault(
        at_s=round(rng.choice((rng.uniform(0, 1.0), rng.uniform(0, 5.0))), 4),
        kind=kind,
        instance=rng.randrange(num_instances),
        lasts_s=lasts,
        amount=amount,
    )
