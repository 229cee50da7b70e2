"""Real servers for the stage: SmolLM2, front and engine as processes, one per platform."""

from __future__ import annotations

import os
from collections.abc import Iterator

import openai
import pytest

from xllm.engine.kernels.native.library import find
from xllm.testing.server_process import ServerProcess, serve

# However long the queue of a busy machine is, nobody is refused for it.
ENVIRONMENT = {**os.environ, "XLLM_MAX_QUEUE_DELAY_S": "0"}
COMMON = ("--max-model-len", "2048", "--num-pages", "400", "--max-num-seqs", "16")


@pytest.fixture(scope="session")
def reference_server(smollm2: str) -> Iterator[ServerProcess]:
    """float32 on the reference platform: what can be compared with transformers."""
    with serve(smollm2, "--platform", "cpu", "--dtype", "float32", *COMMON, env=ENVIRONMENT) as process:
        yield process


@pytest.fixture(scope="session")
def native_server(smollm2: str) -> Iterator[ServerProcess]:
    """What a user gets who asks for nothing."""
    path, why = find()
    if path is None:
        pytest.skip(f"no native kernels: {why}")
    with serve(smollm2, *COMMON, env=ENVIRONMENT) as process:
        assert any("platform=native" in line for line in process.lines)
        yield process


@pytest.fixture(scope="session", params=["reference", "native"])
def server(request: pytest.FixtureRequest) -> ServerProcess:
    found: ServerProcess = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0, timeout=120
    ) as made:
        yield made
