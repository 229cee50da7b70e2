"""No token lost, none twice, one end: whatever becomes of the engines while a request runs."""

from __future__ import annotations

import asyncio

import pytest

from tests.null.service.conftest import (
    House,
    byte_ids,
    collect,
    finishes,
    outcome,
    say,
    text_of,
    tokens_of,
    turns,
)
from xllm.errors import CapacityError, InternalError, UnavailableError
from xllm.service.live import LiveRequest
from xllm.testing.fake_engine import SampleEngine
from xllm.types import EngineSnapshot
from xllm.wire.messages import Abort, Frame, Frames, Pulse, Stats, Submit

SCRIPT = "one two STOP three"


async def started(house: House, engine: SampleEngine, num_tokens: int, **params: object) -> LiveRequest:
    """A request that has committed `num_tokens` (of choice 0) from this engine."""
    stream = await house.submit(**params)
    await engine.saw(Submit)
    for count in range(1, num_tokens + 1):
        await turns(engine.step)
        await turns(lambda: stream.journal.num_committed >= count)  # noqa: B023  awaited at once
    return stream


def resumed_spec(engine: SampleEngine, index: int = -1) -> Submit:
    submits = [m for m in engine.received if isinstance(m, Submit)]
    return submits[index]


@pytest.mark.parametrize("cut", [0, 1, 7, len(SCRIPT) - 1, len(SCRIPT)])
async def test_a_crash_at_any_point_is_not_seen_by_the_client(house: House, cut: int) -> None:
    doomed = await house.engine(auto=False, script=say(SCRIPT))
    stream = await started(house, doomed, cut)
    heir = await house.engine(script=say(SCRIPT))
    doomed.crash()
    deltas = await collect(stream)
    assert text_of(deltas) == SCRIPT
    assert tokens_of(deltas) == (*byte_ids(SCRIPT), 2)
    assert finishes(deltas) == {0: ("stop", None)}
    assert stream.usage().completion_tokens == len(SCRIPT) + 1
    spec = resumed_spec(heir).spec
    assert spec.attempt == 1
    assert spec.request_id == stream.request_id
    assert (spec.emitted[0] if cut else spec.emitted) == (byte_ids(SCRIPT[:cut]) if cut else ())
    assert house.front.snapshot().num_moves == {"lost": 1}
