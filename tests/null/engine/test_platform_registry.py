"""Choosing a platform: by name, automatically, and with reasons when it cannot serve."""

from __future__ import annotations

import ctypes
import sys

import pytest

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig, PlatformConfig
from xllm.engine.platform import registry
from xllm.engine.platform.registry import platform_names, select_platform
from xllm.errors import ConfigError

ARCH = ArchConfig(
    name="llama",
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position=256,
    tie_word_embeddings=True,
    layer_windows=(None,),
)


def config(name: str) -> EngineConfig:
    return EngineConfig(platform=PlatformConfig(platform=name))


def test_names_hold_the_built_in_ones() -> None:
    assert {"cpu", "cuda", "null"} <= set(platform_names())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no platform of this name is installed.*known platforms: .*cpu"):
        select_platform(config("tpu"), ARCH)


def test_without_torch_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("cpu", "cuda"):
        monkeypatch.delitem(sys.modules, f"xllm.engine.platform.{name}", raising=False)
    for loaded in [m for m in sys.modules if m.startswith("xllm.engine.kernels.reference")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ConfigError, match=r"torch is not installed; `make test-setup` brings it"):
        select_platform(config("cpu"), ARCH)


def test_without_a_driver_torch_is_not_imported_to_find_that_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(registry, "_AUTO", ("cuda", "null"))
    platform, reasons = select_platform(config("auto"), ARCH)
    assert platform.name == "null"
    assert any("cuda refused" in line and "driver" in line for line in reasons)


def test_a_driver_leads_to_the_platform_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "xllm.engine.platform.cuda", raising=False)
    for loaded in [m for m in sys.modules if m.startswith("xllm.engine.kernels.reference")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(registry, "_AUTO", ("cuda", "null"))
    _, reasons = select_platform(config("auto"), ARCH)
    assert any("cuda refused: torch is not installed" in line for line in reasons)
