"""The message loop while a step runs: what arrives gets into the next step, and frames wait for nothing."""

from __future__ import annotations

import queue

import pytest

from xllm.engine.loop import EngineLoop
from xllm.engine.plan import StepPlan
from xllm.engine.port import Item
from xllm.engine.progress import Pace
from xllm.testing.clock import FakeClock
from xllm.testing.null_engine import NullEngine, null_engine, spec
from xllm.wire.messages import EngineMessage, Frames, Ready, Submit

STEP_MS = 100.0


class Front:
    """A session in memory; `heard` is what it was told, and after how many plans."""

    number, version, pulsing = 1, 1, False

    def __init__(self, plans: list[StepPlan]) -> None:
        self.heard: list[tuple[int, EngineMessage]] = []
        self._plans = plans

    def send(self, message: EngineMessage) -> None:
        self.heard.append((len(self._plans), message))

    def took(self) -> None:
        return

    def end(self) -> None:
        return


class Inbox(queue.SimpleQueue[Item]):
    """Waiting for it moves the clock; `later` arrives half-way through the first wait with a time limit."""

    def __init__(self, clock: FakeClock, first: Item, later: Item) -> None:
        self._clock = clock
        self._items = [first]
        self._later = [later]

    def get(self, block: bool = True, timeout: float | None = None) -> Item:
        if self._items:
            return self._items.pop()
        if not block:
            raise queue.Empty
        if timeout is not None and timeout < 1.0:
            if self._later:
                self._clock.advance(timeout / 2)
                return self._later.pop()
            self._clock.advance(timeout)
            raise queue.Empty
        return None, None  # nothing can run any more: stop


def watched(engine: NullEngine) -> list[StepPlan]:
    plans: list[StepPlan] = []
    submit = engine.core.steps.submit

    def seen(plan: StepPlan) -> None:
        plans.append(plan)
        submit(plan)

    engine.core.steps.submit = seen  # type: ignore[method-assign]
    return plans


def test_a_request_that_arrives_while_a_step_runs_is_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "predict_ms", lambda self, shape: STEP_MS)
    engine = null_engine(lookahead=True)
    plans = watched(engine)
    front = Front(plans)
    prompt = tuple(range(10, 40))
    items = [
        (front, Submit(spec=spec(name, prompt, max_tokens=4, ignore_eos=True))) for name in ("first", "later")
    ]
    inbox = Inbox(engine.clock, *items)
    loop = EngineLoop(engine.core, {}, inbox, Ready(card=engine.core.card, pid=0), parent=front)
    loop.run()
    assert [len(plan.sequences) for plan in plans] == [1, 2, 2, 2, 1]
    assert [plan.step for plan in plans] == [1, 2, 3, 4, 5]
    # The first token left when its step was over: two steps were planned by then, not three.
    first = next(at for at, message in front.heard if isinstance(message, Frames))
    assert first == 2
    engine.memory.check_idle()
