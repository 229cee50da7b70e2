"""Settings that `xllm serve` cannot honour are refused, not ignored."""

from __future__ import annotations

import pytest

from xllm.cli.main import main


def test_a_registry_is_for_service_and_instance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "smollm2", "--registry", "etcd://127.0.0.1:2379"]) == 2
    said = capsys.readouterr().err
    assert "xllm service" in said
    assert "xllm instance" in said
