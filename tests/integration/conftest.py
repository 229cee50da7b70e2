"""One real server for the stage: SmolLM2 on the reference platform, front and engine as processes."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from xllm.testing.server_process import ServerProcess, serve

CONTEXT = 2048


@pytest.fixture(scope="session")
def server(smollm2: str) -> Iterator[ServerProcess]:
    with serve(
        smollm2,
        "--dtype",
        "float32",
        "--max-model-len",
        str(CONTEXT),
        "--num-pages",
        "400",
        "--max-num-seqs",
        "16",
    ) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0, timeout=120
    ) as made:
        yield made
