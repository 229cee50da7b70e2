"""Which instances are suspected: silent ones, and busy ones whose step makes no progress.

Pure and passive: told of pulses and output with the time of their arrival, asked at each tick. Loss of a
connection is not its matter, nor is what happens to a suspect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from xllm.wire.messages import Pulse

STALL_S = 1.0
"""A tick later than this was missed by the front itself; then everybody gets a fresh interval."""

LONGEST_LIMIT_S = 60.0
"""However long a step is said to take: a wrong prediction must not switch detection off."""

UNTOLD_FACTOR = 5.0
"""Times the floor for a step without prediction: an engine's first steps may honestly be long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorLimits:
    """From FrontConfig: suspected after max(floor, factor × predicted rest), given up after `kill_s` more."""

    floor_s: float
    factor: float
    kill_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a tick found. `quiet_s` is the time since the last sign of progress.

    suspect → (ready | hung); hung is said once per suspicion, and the instance may still come back.
    """

    name: str
    kind: Literal["suspect", "ready", "hung"]
    reason: str
    quiet_s: float


class _Watched:
    """One instance. Times are those of arrival here: the peer's clock is never compared with ours."""

    __slots__ = (
        "busy", "heard_s", "hung", "progress_s", "pulses", "rest_s", "span_s", "stamp", "suspect_s", "told"
    )  # fmt: skip

    def __init__(self, now_s: float, pulses: bool) -> None:
        self.pulses = pulses
        self.heard_s = self.progress_s = now_s
        self.stamp = (-1, -1)
        self.busy = False
        self.told = True
        self.rest_s = 0.0
        """Predicted rest of the step when the last pulse was sent."""
        self.span_s = 0.0
        """Predicted time from the last progress to the end of the step."""
        self.suspect_s: float | None = None
        self.hung = False


class Detector:
    """States of all instances by name. `add` after `remove` starts anew: another incarnation."""

    def __init__(self, limits: DetectorLimits, tick_s: float) -> None:
        """`tick_s` is the interval at which `tick` will be called."""
        self._limits = limits
        self._tick_s = tick_s
        self._watched: dict[str, _Watched] = {}
        self._last_tick_s: float | None = None

    def add(self, name: str, now_s: float, *, pulses: bool = False) -> None:
        """Watch an instance. Without `pulses` silence means nothing until its first pulse."""
        self._watched[name] = _Watched(now_s, pulses)

    def remove(self, name: str) -> None:
        self._watched.pop(name, None)

    def is_suspect(self, name: str) -> bool:
        watched = self._watched.get(name)
        return watched is not None and watched.suspect_s is not None

    def quiet_s(self, name: str, now_s: float) -> float:
        """Since the last progress of an instance; 0 for an unknown one."""
        watched = self._watched.get(name)
        return 0.0 if watched is None else now_s - watched.progress_s

    # -- what is heard ----------------------------------------------------------------------------

    def heard(self, name: str, now_s: float) -> None:
        """A message that shows no more than that the process lives."""
        watched = self._watched.get(name)
        if watched is not None:
            watched.heard_s = now_s

    def progress(self, name: str, now_s: float) -> None:
        """Output of the step thread."""
        watched = self._watched.get(name)
        if watched is not None:
            watched.heard_s = watched.progress_s = now_s
            watched.span_s = 0.0

    def pulse(self, name: str, now_s: float, pulse: Pulse) -> None:
        watched = self._watched.get(name)
        if watched is None:
            return
        watched.pulses = True
        watched.heard_s = now_s
        stamp = (pulse.step, pulse.layer)
        if stamp != watched.stamp or not pulse.busy:
            watched.progress_s = now_s
            watched.span_s = 0.0
        watched.stamp = stamp
        watched.busy = pulse.busy
        watched.told = pulse.predicted_ms > 0
        rest_s = (pulse.predicted_ms - pulse.step_age_ms) / 1000
        watched.rest_s = rest_s if pulse.busy and 0 < rest_s < math.inf else 0.0
        if watched.rest_s > 0 and not watched.span_s:
            # Once per progress: a peer that always says "nearly done" does not put its deadline off.
            watched.span_s = watched.rest_s + now_s - watched.progress_s

    # -- what follows -------------------------------------------------------------------------------

    def tick(self, now_s: float) -> tuple[Finding, ...]:
        """Changes since the last tick, by name."""
        if self._last_tick_s is not None and now_s - self._last_tick_s > self._tick_s + STALL_S:
            self._refresh(now_s)
        self._last_tick_s = now_s
        found = (self._judge(name, self._watched[name], now_s) for name in sorted(self._watched))
        return tuple(f for f in found if f is not None)

    def _refresh(self, now_s: float) -> None:
        """It was the front that stood still: what others said meanwhile may lie unread."""
        for watched in self._watched.values():
            if watched.suspect_s is None:
                watched.heard_s = watched.progress_s = now_s

    def _judge(self, name: str, watched: _Watched, now_s: float) -> Finding | None:
        reason = self._overdue(watched, now_s)
        quiet_s = now_s - watched.progress_s
        if reason is None:
            if watched.suspect_s is None:
                return None
            watched.suspect_s, watched.hung = None, False
            return Finding(name=name, kind="ready", reason="progress", quiet_s=quiet_s)
        if watched.suspect_s is None:
            watched.suspect_s = now_s
            return Finding(name=name, kind="suspect", reason=reason, quiet_s=quiet_s)
        if not watched.hung and now_s - watched.suspect_s >= self._limits.kill_s:
            watched.hung = True
            return Finding(name=name, kind="hung", reason=reason, quiet_s=quiet_s)
        return None

    def _overdue(self, watched: _Watched, now_s: float) -> str | None:
        if not watched.pulses:
            return None
        if now_s - watched.heard_s > self._limit_s(watched.rest_s, told=True):
            return "silent"
        if watched.busy and now_s - watched.progress_s > self._limit_s(watched.span_s, watched.told):
            return "stuck"
        return None

    def _limit_s(self, predicted_s: float, told: bool) -> float:
        floor_s = self._limits.floor_s if told else self._limits.floor_s * UNTOLD_FACTOR
        return max(floor_s, min(self._limits.factor * predicted_s, LONGEST_LIMIT_S))
