"""Makes a failing schedule small: drops faults, requests and instances while it still fails.

Greedy and deterministic; what it gives back is for a reader, not for a proof of minimality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from xllm.simulation.hand_over import HandOvers
from xllm.simulation.schedule import Fault, Schedule, SimRequest


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], max_runs: int = 300) -> Schedule:
    """The smallest schedule found in `max_runs` runs for which `fails` holds."""
    num_runs = 0
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(schedule):
            num_runs += 1
            if num_runs > max_runs:
                return schedule
            if fails(smaller):
                schedule, progress = smaller, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Big steps first."""
    requests, faults = schedule.requests, schedule.faults
    if schedule.hand_overs is not None:
        yield replace(schedule, hand_overs=None)
        yield from (replace(schedule, hand_overs=fewer) for fewer in _fewer_moves(schedule.hand_overs))
    if len(requests) > 2:
        half = len(requests) // 2
        yield _with_requests(schedule, range(half))
        yield _with_requests(schedule, range(half, len(requests)))
    if len(faults) > 1:
        half = len(faults) // 2
        yield replace(schedule, faults=faults[:half])
        yield replace(schedule, faults=faults[half:])
    for i in range(len(faults)):
        yield replace(schedule, faults=faults[:i] + faults[i + 1 :])
    if len(requests) > 1:
        for i in range(len(requests)):
            yield _with_requests(schedule, [j for j in range(len(requests)) if j != i])
    if len(schedule.starts_s) > 1:
        last = len(schedule.starts_s) - 1
        kept = tuple(f for f in faults if f.instance < last)
        hand_overs = schedule.hand_overs
        if hand_overs is not None:
            moves = tuple(m for m in hand_overs.moves if m.instance < last)
            switches = tuple(s for s in hand_overs.switches if s.instance < last)
            hand_overs = replace(hand_overs, moves=moves, switches=switches, roles=hand_overs.roles[:last])
        yield replace(schedule, starts_s=schedule.starts_s[:last], faults=kept, hand_overs=hand_overs)
    for i, request in enumerate(requests):
        plain = _plain(request)
        if plain != request:
            yield replace(schedule, requests=(*requests[:i], plain, *requests[i + 1 :]))


def _fewer_moves(hand_overs: HandOvers) -> Iterator[HandOvers]:
    moves = hand_overs.moves
    if hand_overs.switches:
        yield replace(hand_overs, switches=())
    if hand_overs.roles:
        yield replace(hand_overs, roles=(), switches=(), adaptive=False)
    if hand_overs.everyone:
        yield replace(hand_overs, everyone=False)
    if len(moves) > 1:
        yield replace(hand_overs, moves=moves[: len(moves) // 2])
        yield replace(hand_overs, moves=moves[len(moves) // 2 :])
    for i in range(len(moves)):
        yield replace(hand_overs, moves=moves[:i] + moves[i + 1 :])


def _with_requests(schedule: Schedule, kept: Sequence[int]) -> Schedule:
    """Moves speak of requests by their index, so they follow."""
    requests = tuple(schedule.requests[i] for i in kept)
    hand_overs = schedule.hand_overs
    if hand_overs is not None:
        new_index = {old: new for new, old in enumerate(kept)}
        moves = (m for m in hand_overs.moves if m.request in new_index)
        moves_left = tuple(replace(m, request=new_index[m.request]) for m in moves)
        hand_overs = replace(hand_overs, moves=moves_left)
    return replace(schedule, requests=requests, hand_overs=hand_overs)


def _plain(request: SimRequest) -> SimRequest:
    return replace(request, habit="read", deadline_ms=None, priority=0, cache_salt="")


def describe(schedule: Schedule) -> str:
    """For a reader: one line for each thing that happens."""
    kind = "servers" if schedule.servers else "children of the front"
    lines = [
        f"seed {schedule.seed}: {len(schedule.starts_s)} {kind} from {schedule.starts_s} s, "
        f"{schedule.num_pages} pages, {schedule.scheduler}, {schedule.step_time.coefficients[0]:g} ms a step"
    ]
    if schedule.hand_overs is not None:
        lines.append(f"  hand-overs: {schedule.hand_overs.describe()}")
        lines += [
            f"  move of request {m.request} to engine-{m.instance} after {m.after} deltas"
            for m in schedule.hand_overs.moves
        ]
    lines += [f"  fault {_fault(f)}" for f in schedule.faults]
    lines += [f"  request {i} {_request(r)}" for i, r in enumerate(schedule.requests)]
    return "\n".join(lines)


def _fault(fault: Fault) -> str:
    lasts = "for ever" if fault.lasts_s is None else f"{fault.lasts_s:g} s"
    return f"{fault.kind} of engine-{fault.instance} at {fault.at_s:g} s, {lasts}, amount {fault.amount:g}"


def _request(request: SimRequest) -> str:
    params = {
        name: value
        for name in request.params.__struct_fields__
        if (value := getattr(request.params, name)) not in (None, (), "", 0, 0.0, False)
    }
    deadline = "" if request.deadline_ms is None else f", deadline {request.deadline_ms:g} ms"
    return (
        f"at {request.at_s:g} s: {len(request.prompt)} tokens{deadline}, "
        f"{request.habit} after {request.after} deltas, {params}"
    )
