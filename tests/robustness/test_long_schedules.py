"""The terminal-event property over thousands of random schedules; the short run is in tests/null."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.null.engine.test_terminal_property import check_schedule, schedules


@pytest.mark.robustness
@given(case=schedules)
@settings(max_examples=3000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_three_thousand_schedules(case) -> None:
    check_schedule(**case)
