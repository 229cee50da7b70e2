"""What an engine's step thread records while somebody asked for a profile: plans, steps with their layers,
what is absorbed and sent, transfers.

Called on the step thread; a caller asks `on` first. Nothing here decides or computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from xllm.clock import Clock
from xllm.engine.plan import StepPlan, StepResult
from xllm.observability.profile import MAX_EVENTS, MAX_S, ProcessProfile, Recorder, Value
from xllm.wire.messages import Frame, Moved

STEPS, THREAD, TRANSFERS = "steps on the device", "step thread", "transfers"


class EngineProfile:
    """`trace_layers` and `layer_stamps` are the runner's, where it can tell when layers end."""

    def __init__(
        self,
        clock: Clock,
        trace_layers: Callable[[bool], None] = lambda on: None,
        layer_stamps: Callable[[], tuple[int, ...]] = lambda: (),
    ) -> None:
        self._clock = clock
        self._trace_layers = trace_layers
        self._layer_stamps = layer_stamps
        self._recorder = Recorder()

    @property
    def on(self) -> bool:
        return self._recorder.on

    def begin(self, max_events: int, max_s: float) -> None:
        """Between two steps. Bounded here too: who asks is only a peer."""
        self._recorder.begin(self._now_ns(), min(max_events, MAX_EVENTS), min(max_s, MAX_S))
        self._trace_layers(True)

    def end(self) -> ProcessProfile:
        """Between two steps."""
        self._trace_layers(False)
        wall_ns, now_ns = int(self._clock.wall_s() * 1e9), self._now_ns()
        return self._recorder.end("engine", os.getpid(), wall_ns, now_ns)

    def planned(self, plan: StepPlan | None, began_s: float) -> None:
        if plan is not None:
            self._thread("plan", began_s, {"step": plan.step, "rows": plan.num_rows})

    def ran(self, plan: StepPlan, result: StepResult) -> None:
        """A step that has just been collected."""
        if result.dropped or not result.ended_s:
            return
        begin_ns, end_ns = int(result.began_s * 1e9), int(result.ended_s * 1e9)
        stamps = self._layer_stamps()
        if stamps:
            # Stamps are whole ns of the same clock, the step's are floats: their last digits may differ.
            begin_ns, end_ns = min(begin_ns, stamps[0]), max(end_ns, stamps[-1])
        args: dict[str, Value] = {
            "step": plan.step,
            "rows": plan.num_rows,
            "sequences": " ".join(str(s.seq_id) for s in plan.sequences),
        }
        self._recorder.complete("step", STEPS, begin_ns, end_ns, args)
        for layer, (since_ns, until_ns) in enumerate(zip(stamps, stamps[1:], strict=False)):
            self._recorder.complete(f"layer {layer}", STEPS, since_ns, until_ns)

    def absorbed(self, plan: StepPlan, began_s: float) -> None:
        self._thread("absorb", began_s, {"step": plan.step})

    def sent(self, outputs: Mapping[int, Sequence[Frame]], began_s: float) -> None:
        requests = dict.fromkeys(frame.request_id for frames in outputs.values() for frame in frames)
        num_tokens = sum(len(frame.tokens) for frames in outputs.values() for frame in frames)
        self._thread("send", began_s, {"tokens": num_tokens, "requests": " ".join(requests)})

    def moved(self, moved: Moved) -> None:
        """Its time is what the sender told: the bytes went while steps ran."""
        name, end_ns = moved.request_id, self._now_ns()
        args: dict[str, Value] = {"request": name, "bytes": moved.num_bytes, "exposed_ms": moved.exposed_ms}
        begin_ns = end_ns - int(moved.transfer_ms * 1e6)
        self._recorder.complete("transfer", TRANSFERS, begin_ns, end_ns, args, name)

    def _thread(self, name: str, began_s: float, args: dict[str, Value]) -> None:
        self._recorder.complete(name, THREAD, int(began_s * 1e9), self._now_ns(), args)

    def _now_ns(self) -> int:
        return int(self._clock.monotonic_s() * 1e9)
