"""Runs the entries against each other: all started once, then round by round, in turn.

A turn is one load on one entry. The order rotates from round to round, so that a machine that grows
slower hurts all alike. What an idle engine burns during the others' turns is measured and told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare.adapters import ADAPTERS, Context, Missing
from benchmarks.compare.engine import Engine, start
from benchmarks.compare.load import Load
from benchmarks.compare.machine import CpuTimes
from benchmarks.compare.process import EngineFailed
from benchmarks.compare.settings import Entry
from xllm.cli.bench.metrics import summarise

Say = Callable[[str], None]
LeftOut = Callable[[Entry, Load], bool]


def nothing(_entry: Entry, _load: Load) -> bool:
    """The `left_out` of a whole comparison."""
    return False


MAX_SETTLE_S = 5.0
MAX_IDLE_CORES = 0.1
_SETTLE_STEP_S = 0.25


@dataclass(slots=True, kw_only=True)
class Result:
    """One entry. `turns[load]` has one summary per round, in order; `problem` says why there are none."""

    entry: Entry
    about: dict[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    memory_bytes: int = 0
    problem: str = ""
    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(slots=True)
class Running:
    result: Result
    engine: Engine


def compare(
    entries: Sequence[Entry],
    loads: Sequence[Load],
    context: Context,
    *,
    num_rounds: int,
    until_s: float,
    ready_timeout_s: float,
    logs: Path,
    say: Say,
    left_out: LeftOut = nothing,
) -> tuple[list[Result], int]:
    """Results in the order of `entries`, and how many whole rounds there were.

    No round is begun that, as long as the last one, would end after `until_s` on the monotonic clock.
    """
    results = [Result(entry=entry) for entry in entries]
    with ExitStack() as stack:
        running = [
            r for result in results if (r := begin(result, context, ready_timeout_s, logs, stack, say))
        ]
        warm_up(running, loads, say, left_out)
        done, longest_s = 0, 0.0
        while done < num_rounds and (done == 0 or time.monotonic() + longest_s < until_s):
            began = time.monotonic()
            for load in loads:
                shift = done % max(1, len(running))
                for one in running[shift:] + running[:shift]:
                    if not left_out(one.result.entry, load):
                        _turn(one, running, load, done, say)
            done += 1
            longest_s = max(longest_s, time.monotonic() - began)
        for one in running:
            one.result.memory_bytes = one.engine.tree.memory_bytes()
    return results, done


def begin(
    result: Result, context: Context, timeout_s: float, logs: Path, stack: ExitStack, say: Say
) -> Running | None:
    """The entry's engine, ready; None, with the reason in `result.problem`, when there is none."""
    entry = result.entry
    try:
        launch = ADAPTERS[entry.engine](entry, context)
        result.about = dict(launch.about)
        began = time.monotonic()
        engine = start(launch, logs / f"{entry.name.replace(' ', '-')}.log")
        stack.callback(engine.tree.stop)
        engine.wait_ready(timeout_s)
    except (Missing, EngineFailed) as error:
        result.problem = str(error)
        say(f"{entry.name}: {result.problem}")
        return None
    result.start_s = time.monotonic() - began
    say(f"{entry.name}: ready after {result.start_s:.1f} s")
    return Running(result, engine)


def warm_up(running: Sequence[Running], loads: Sequence[Load], say: Say, left_out: LeftOut = nothing) -> None:
    for one in running:
        for load in loads:
            if left_out(one.result.entry, load):
                continue
            asks, at_s = load.warm_up()
            _guarded(one, lambda: one.engine.measure(asks, at_s, load.concurrency), say)  # noqa: B023


def settle(running: Sequence[Running], max_s: float = MAX_SETTLE_S) -> None:
    """Wait until all engines rest: some keep a core busy for a second after their last answer."""
    deadline = time.monotonic() + max_s
    while time.monotonic() < deadline:
        before = sum(one.engine.tree.cpu_s() for one in running)
        time.sleep(_SETTLE_STEP_S)
        if sum(one.engine.tree.cpu_s() for one in running) - before < MAX_IDLE_CORES * _SETTLE_STEP_S:
            return


def _turn(one: Running, running: Sequence[Running], load: Load, number: int, say: Say) -> None:
    if one.result.problem:
        return
    asks, at_s = load.round(number)
    settle(running)
    cpu, used_s = CpuTimes.now(), [other.engine.tree.cpu_s() for other in running]
    began = time.monotonic()
    outcomes = _guarded(one, lambda: one.engine.measure(asks, at_s, load.concurrency), say)
    if outcomes is None:
        return
    wall_s = time.monotonic() - began
    spent_s = [other.engine.tree.cpu_s() - before for other, before in zip(running, used_s, strict=True)]
    own_s = sum(s for other, s in zip(running, spent_s, strict=True) if other is one)
    summary = summarise(outcomes, {})
    summary["input_throughput"] = summary["total_input_tokens"] / (summary["duration"] or 1.0)
    summary |= {
        "round": number,
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error}),
        "cpu_cores": own_s / wall_s,
        "idle_engines_cores": (sum(spent_s) - own_s) / wall_s,
        "strangers_cores": CpuTimes.now().strangers_s(cpu, sum(spent_s)) / wall_s,
    }
    one.result.turns.setdefault(load.name, []).append(summary)
    say(
        f"round {number + 1}, {load.name}, {one.result.entry.name}: "
        f"{summary[load.speed_key]:.1f} tokens/s, {summary['failed']} failed"
    )


def _guarded(one: Running, action: Callable[[], Any], say: Say) -> Any:
    """The action's result; None, and the entry out of the comparison, when its engine has gone."""
    if one.result.problem:
        return None
    try:
        return action()
    except EngineFailed as error:
        one.result.problem = f"ended while measured: {error}"
        say(f"{one.result.entry.name}: {one.result.problem}")
        return None
