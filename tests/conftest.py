"""Fixtures for all stages. The real model is found or pulled through `xllm.artifacts`, pinned by hash."""

from __future__ import annotations

import os

import pytest

from xllm.artifacts.resolve import resolve
from xllm.errors import ConfigError

# Before torch is imported: as `config.env.engine_environment` does for engine processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The catalogue name of the default model, once its file is on this machine."""
    try:
        resolve("smollm2")
    except ConfigError as error:
        pytest.skip(f"SmolLM2 is not here and could not be fetched: {error}")
    return "smollm2"
