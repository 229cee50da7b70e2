"""When an engine is started again and what its end is held for: tables over the pure decisions."""

from __future__ import annotations

import signal

import pytest

from xllm.config.instances import MAX_LOCAL, parse_instances, roles_of
from xllm.errors import ConfigError
from xllm.service.failover.blame import DeathCause
from xllm.service.instances.restart import HEALTHY_S, Restarts, cause_of_death
from xllm.types import DECODE, MIXED, PREFILL


def test_the_first_restart_is_at_once_and_a_loop_gets_slower_up_to_thirty_seconds() -> None:
    restarts = Restarts()
    assert [restarts.died(now_s) for now_s in range(9)] == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert restarts.num_deaths == 9


def test_an_engine_that_serves_for_a_while_and_dies_again_and_again_is_still_a_loop() -> None:
    restarts = Restarts()
    now_s, delays = 0.0, []
    for _ in range(4):
        restarts.serving(now_s)
        now_s += HEALTHY_S - 1
        delays.append(restarts.died(now_s))
    assert delays == [0, 1, 2, 4]


def test_a_minute_of_health_begins_the_row_anew() -> None:
    restarts = Restarts()
    for now_s in range(5):
        restarts.died(now_s)
    restarts.serving(100.0)
    assert restarts.died(100.0 + HEALTHY_S) == 0
    assert restarts.died(101.0 + HEALTHY_S) == 1


def test_engines_that_served_and_are_killed_from_outside_come_back_at_once_every_time() -> None:
    restarts = Restarts()
    for now_s in range(20):
        restarts.serving(float(now_s))
        assert restarts.died(now_s + 0.5, "killed") == 0.0
    restarts.serving(30.0)
    assert restarts.died(30.5, "hang") == 0.0
    restarts.serving(31.0)
    assert restarts.died(31.5, "hang") > 0.0
    assert restarts.died(32.0, "killed") > 0.0  # it never came to serve


def test_a_start_that_fails_is_no_health_however_long_it_took() -> None:
    restarts = Restarts()
    restarts.serving(0.0)
    assert restarts.died(1.0) == 0
    assert restarts.died(1000.0) == 1


@pytest.mark.parametrize(
    ("exit_code", "stopped", "silent", "cause"),
    [
        (-signal.SIGSEGV, False, False, "crash"),
        (-signal.SIGABRT, False, False, "crash"),
        (1, False, False, "crash"),
        (-signal.SIGKILL, False, False, "killed"),
        (-signal.SIGTERM, False, False, "killed"),
        (0, False, False, "unknown"),
        (None, False, False, "unknown"),
        # Killed for its silence: the silence counts, not the signal that ended it.
        (-signal.SIGKILL, False, True, "hang"),
        (None, False, True, "hang"),
        (None, True, True, "stopped"),
        (None, True, False, "stopped"),
        (-signal.SIGKILL, True, False, "stopped"),
    ],
)
def test_causes(exit_code: int | None, stopped: bool, silent: bool, cause: DeathCause) -> None:
    assert cause_of_death(exit_code, stopped=stopped, silent=silent) == cause


def test_instances_are_counted_by_role() -> None:
    assert parse_instances("mixed:1") == {"mixed": 1}
    assert parse_instances(f"mixed:{MAX_LOCAL}") == {"mixed": MAX_LOCAL}
    assert parse_instances("prefill:1, decode:2") == {"prefill": 1, "decode": 2}
    assert parse_instances("decode:1,mixed:1,prefill:0") == {"decode": 1, "mixed": 1, "prefill": 0}


def test_engines_that_take_prompts_are_started_first() -> None:
    assert roles_of(parse_instances("decode:2,prefill:1")) == (PREFILL, DECODE, DECODE)
    assert roles_of(parse_instances("mixed:2,decode:1")) == (MIXED, MIXED, DECODE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2", "role:count"),
        ("mixed", "role:count"),
        ("mixed:-1", "role:count"),
        ("mixed:1,", "role:count"),
        ("mixed:0", "between 1"),
        (f"mixed:{MAX_LOCAL + 1}", "between 1"),
        ("prefill:1,prefill:1,decode:1", "once"),
        ("mixed:1,encode:1", "encode is not yet"),
        ("banana:1", "each of the roles mixed, prefill, decode"),
        ("prefill:2", "no engine decodes; add decode:1"),
        ("decode:2,prefill:0", "no engine takes prompts; add prefill:1"),
    ],
)
def test_instances_that_cannot_be_are_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        parse_instances(text)
    assert refused.value.param == "instances"
