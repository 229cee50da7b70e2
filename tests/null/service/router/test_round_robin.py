"""Router policies: round-robin as a table of cases, and where policies come from."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from xllm.config import FrontConfig
from xllm.errors import ConfigError
from xllm.service.router import registry
from xllm.service.router.base import InstanceView, RequestView, RouterSnapshot
from xllm.service.router.round_robin import round_robin
from xllm.types import EngineSnapshot

VIEW = RequestView(request_id="r", model="m", num_prompt_tokens=3)


def snapshot(turn: int, *rooms: int) -> RouterSnapshot:
    """Instances a, b, c … with so much room each."""
    return RouterSnapshot(
        turn=turn,
        instances=tuple(
            InstanceView(name=chr(97 + i), num_reqs=0, max_reqs=room, engine=EngineSnapshot())
            for i, room in enumerate(rooms)
        ),
    )


@pytest.mark.parametrize(
    ("turn", "rooms", "chosen"),
    [
        (0, (1,), "a"),
        (0, (1, 1, 1), "a"),
        (1, (1, 1, 1), "b"),
        (3, (1, 1, 1), "a"),
        (0, (0, 1, 1), "b"),
        (2, (1, 1, 0), "a"),
        (5, (0, 1, 0), "b"),
        (0, (0, 0), None),
    ],
)
def test_round_robin(turn: int, rooms: tuple[int, ...], chosen: str | None) -> None:
    placement = round_robin(VIEW, snapshot(turn, *rooms), FrontConfig())
    assert (placement and placement.instance) == chosen


def test_a_policy_says_why() -> None:
    placement = round_robin(VIEW, snapshot(2, 1, 1, 0), FrontConfig())
    assert placement is not None
    assert "passed_over=1" in placement.reasons


def test_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="round-robin"):
        registry.load_policy("round-robbin")


def test_a_policy_from_outside_the_tree_loads_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "xllm.service.router.round_robin:round_robin", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert registry.load_policy("mine") is round_robin
