"""What start-up prints, and the one reader of the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm.config import env
from xllm.config.report import StartupReport, gib, sources_lines


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return 0.0


def test_every_stage_shows_its_own_seconds_and_the_end_their_sum() -> None:
    clock = Clock()
    report = StartupReport(clock)
    clock.now_s = 101.5
    assert report.stage("files").split() == ["1.50", "s", "files"]
    clock.now_s = 103.75
    assert report.stage("weights").split() == ["2.25", "s", "weights"]
    assert report.total().split() == ["3.75", "s", "total"]


def test_values_are_shown_with_their_source_and_keys_are_not() -> None:
    lines = sources_lines(
        {"port": 1, "api_key": ("secret",), "host": "x"}, {"port": "environment", "api_key": "file a.yaml"}
    )
    assert lines == ["api_key = set (file a.yaml)", "port = 1 (environment)"]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(2**30, "1.00 GiB"), (3 * 2**29, "1.50 GiB"), (2**20, "1.0 MiB"), (0, "0.0 MiB")]
)
def test_bytes_are_shown_for_people(num_bytes: int, text: str) -> None:
    assert gib(num_bytes) == text


def test_only_our_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_PORT", "1")
    monkeypatch.setenv("OTHER", "2")
    assert env.variables()["XLLM_PORT"] == "1"
    assert "OTHER" not in env.variables()


def test_the_cache_directory_has_three_possible_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-user")
    monkeypatch.delenv("XLLM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert env.cache_dir() == Path("/home-of-user/.cache/xllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert env.cache_dir() == Path("/xdg/xllm")
    monkeypatch.setenv("XLLM_CACHE_DIR", "/own")
    assert env.cache_dir() == Path("/own")
