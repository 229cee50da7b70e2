"""Which instance changes its role now, and why: a decision per period from predictions and what was seen.

Among all splits of the instances into roles the one with the smallest worst miss is aimed at, but only when
an objective is in danger, the gain is clear and the danger lasts; all mixed is a split like any other.
No clock, no I/O; what must be remembered between two looks is a value of the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from xllm.service.roles.monitor import Demand
from xllm.service.roles.outlook import Outlook, Work, outlook, work_of
from xllm.service.roles.splits import RoleView, Switch, best_split, num_tokens, split_of, steps_towards, told
from xllm.service.router.base import InstanceView
from xllm.types import DECODE, MIXED, PREFILL, Phase

CONFIRM = 2
"""Looks in a row that must find the same danger."""
LASTING = 8
"""The same before an instance gives up a phase for which nobody else gains it: of all mixed a burst makes a
danger that is over before a switch has helped."""
MIN_GAIN = 0.15
"""Of the worst share: less is within the error of the predictions, and would flip back and forth."""
BUSY = 0.5
MEMORY_S = 60.0
IDLE_S = 2.0
_SMOOTH = 0.3
_MAX_BIAS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleLimits:
    """Objectives, and how long an instance keeps a role at least."""

    ttft_ms: float
    tpot_ms: float
    cooldown_s: float = 5.0


@dataclass(slots=True)
class ControlState:
    """Of one model, owned by the caller: looks in a row that found a danger, and who has idled since when."""

    num_seen: int = 0
    idle_since_s: dict[str, float] = field(default_factory=dict)
    num_decoding: float = 0.0
    draws_per_ms: float = 0.0
    """Smoothed: streams come and go faster than roles should."""
    switched_s: dict[str, list[float]] = field(default_factory=dict)
    """When each instance was switched here, of late."""

    def may_switch(self, name: str, now_s: float, cooldown_s: float) -> bool:
        """One that went back and forth rests twice as long each time: predictions were wrong about it."""
        times = self.switched_s[name] = [t for t in self.switched_s.get(name, ()) if now_s - t < MEMORY_S]
        return not times or now_s - times[-1] >= cooldown_s * 2 ** (len(times) - 1)


def tick(
    views: Sequence[RoleView], demand: Demand, state: ControlState, limits: RoleLimits, now_s: float
) -> tuple[Switch, ...]:
    """At most one switch towards prefill and one towards decode, or all to mixed. `views`: one model's."""
    if len(views) < 2:
        return ()
    lacking = next((p for p in sorted(MIXED) if not any(p in v.load.phases for v in views)), None)
    if lacking is not None:
        return _repaired(views, lacking)
    work = _smoothed(
        _calibrated(views, work_of([v.load for v in views], demand, [v.tpot_ms for v in views])), state
    )
    now = split_of(views)
    predicted = outlook(now, work, limits.ttft_ms, limits.tpot_ms)
    present = _as_seen(views, predicted, limits)
    danger = _danger(views, present, state, now_s)
    state.num_seen = state.num_seen + 1 if danger else 0
    # Idleness has lasted already when it is found.
    if not danger or (state.num_seen < CONFIRM and danger != "idle_prefill"):
        return ()
    free = [
        v
        for v in views
        if not v.pinned
        and (v.is_first_role or now_s - v.since_s >= limits.cooldown_s)
        and state.may_switch(v.load.name, now_s, limits.cooldown_s)
    ]
    if danger == "idle_prefill" and predicted.worst <= BUSY:
        return ()  # one gap made few streams look slow
    target, reached = best_split(views, work, limits.ttft_ms, limits.tpot_ms, now)
    if target == now or reached.worst > (1.0 - MIN_GAIN) * present.worst:
        return ()
    if target.num_mixed < now.num_mixed and state.num_seen < LASTING:
        return ()
    numbers = (
        f"ttft={present.ttft:.2f}->{reached.ttft:.2f},tpot={present.tpot:.2f}->{reached.tpot:.2f},"
        f"kv={present.kv:.2f}->{reached.kv:.2f},split={told(now)}->{told(target)},"
        f"backlog_ms={work.backlog_ms:.0f},decoding={work.num_decoding:.0f}"
    )
    switches = steps_towards(views, free, now, target, danger, numbers)
    for switch in switches:
        state.switched_s[switch.instance].append(now_s)
    return switches


def _repaired(views: Sequence[RoleView], phase: Phase) -> tuple[Switch, ...]:
    """An instance was lost, and with it the last one of a phase: waiting for its return helps nobody."""
    free = [v for v in views if not v.pinned]
    if not free:
        return ()
    chosen = min(free, key=lambda v: (num_tokens(v.load), v.load.name))
    return (
        Switch(
            instance=chosen.load.name,
            phases=MIXED,
            epoch=chosen.epoch,
            reason="floor",
            numbers=f"no_{phase}",
        ),
    )


def _danger(views: Sequence[RoleView], present: Outlook, state: ControlState, now_s: float) -> str:
    """The objective that is missed most, or idle instances while others are busy, or nothing."""
    idle = {v.load.name for v in views if v.load.phases == PREFILL and _is_idle(v.load)}
    state.idle_since_s = {name: state.idle_since_s.get(name, now_s) for name in idle}
    if present.worst > 1.0:
        return max(("ttft", present.ttft), ("tpot", present.tpot), ("kv", present.kv), key=lambda x: x[1])[0]
    has_idled = any(now_s - since_s >= IDLE_S for since_s in state.idle_since_s.values())
    return "idle_prefill" if has_idled and max(present.tpot, present.kv) > BUSY else ""


def _is_idle(load: InstanceView) -> bool:
    return max(load.backlog_tokens, load.engine.backlog_tokens) == 0 and load.engine.num_decoding == 0


def _calibrated(views: Sequence[RoleView], work: Work) -> Work:
    """Observed times per token correct the prediction: of streams that no prompt disturbs."""
    ratios = []
    for view in views:
        engine = view.load.engine
        is_pure = view.load.phases == DECODE and not view.load.old_phases and engine.num_decoding > 0
        predicted_ms = work.cost.decode_ms(engine.num_decoding, engine.decode_context)
        if is_pure and predicted_ms > 0.0 and view.tpot_ms is not None:
            ratios.append(view.tpot_ms / predicted_ms)
    if not ratios:
        return work
    bias = sum(ratios) / len(ratios)
    return replace(work, tpot_bias=min(_MAX_BIAS, max(1.0 / _MAX_BIAS, bias)))


def _smoothed(work: Work, state: ControlState) -> Work:
    """A rise counts at once, a fall with time: to have too few decoders hurts more than to have too many."""
    for name in ("num_decoding", "draws_per_ms"):
        now, before = getattr(work, name), getattr(state, name)
        setattr(state, name, max(now, before + _SMOOTH * (now - before)))
    return replace(work, num_decoding=state.num_decoding, draws_per_ms=state.draws_per_ms)


def _as_seen(views: Sequence[RoleView], present: Outlook, limits: RoleLimits) -> Outlook:
    """What streams really see now is no better for having been predicted better."""
    seen = [
        (v.load.engine.num_decoding, v.tpot_ms)
        for v in views
        if v.tpot_ms is not None and v.load.engine.num_decoding
    ]
    num = sum(n for n, _ in seen)
    if not num:
        return present
    mean_ms = sum(n * tpot_ms for n, tpot_ms in seen) / num
    return replace(present, tpot=max(present.tpot, mean_ms / limits.tpot_ms))
