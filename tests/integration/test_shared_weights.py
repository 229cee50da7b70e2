"""Two engines of one host, SmolLM2: one copy of the weights in memory, and little beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from xllm.engine.kernels.native.library import find
from xllm.testing.server_process import ServerProcess, serve

MIB = 1 << 20
NUM_PAGES = 64
PAGE_BYTES = 2 * 30 * 3 * 64 * 64 * 2
SETTINGS = ("--quantize", "none", "--max-model-len", "2048", "--num-pages", str(NUM_PAGES))
BESIDE_BYTES = 250 * MIB


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "packed"


@pytest.fixture(scope="module")
def first(smollm2: str, cache: Path) -> Iterator[ServerProcess]:
    path, why = find()
    if path is None:
        pytest.skip(f"no native kernels: {why}")
    with serve(smollm2, *SETTINGS, env={**os.environ, "XLLM_WEIGHTS_CACHE": str(cache)}) as server:
        yield server


@pytest.fixture(scope="module")
def second(smollm2: str, cache: Path, first: ServerProcess) -> Iterator[ServerProcess]:
    with serve(smollm2, *SETTINGS, env={**os.environ, "XLLM_WEIGHTS_CACHE": str(cache)}) as server:
        yield server


def answer(server: ServerProcess, model: str) -> str:
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}
    reply = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60)
    return str(reply.raise_for_status().json()["choices"][0]["text"])


def engine_pid(server: ServerProcess) -> int:
    (child,) = psutil.Process(server.pid).children()
    return int(child.pid)


def sizes(pid: int, path: Path | None = None) -> dict[str, int]:
    """Bytes by kind, of the whole process or of its mappings of a file."""
    total: dict[str, int] = {}
    counts = path is None
    for line in Path(f"/proc/{pid}/{'smaps_rollup' if path is None else 'smaps'}").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = path is None or line.endswith(str(path))
        elif counts and line.endswith(" kB"):
            kind, amount, _ = line.split()
            total[kind[:-1]] = total.get(kind[:-1], 0) + int(amount) * 1024
    return total


def test_the_second_start_maps_what_the_first_one_kept(
    smollm2: str, cache: Path, first: ServerProcess, second: ServerProcess
) -> None:
    (file,) = cache.glob("*.packed")
    for server in (first, second):
        assert any("weights_cache=" in line and "mapped in" in line for line in server.lines)
    assert answer(first, smollm2) == answer(second, smollm2)

    bound = file.stat().st_size + NUM_PAGES * PAGE_BYTES + BESIDE_BYTES
    for server in (first, second):
        pid = engine_pid(server)
        assert sizes(pid)["Pss"] <= bound
        mapped = sizes(pid, file)
        assert mapped["Rss"] >= 0.99 * file.stat().st_size
        assert mapped["Pss"] <= 0.51 * file.stat().st_size
        # What is not shared must fit beside the weights even if nobody shared them.
        assert sizes(pid)["Pss"] - mapped["Pss"] <= NUM_PAGES * PAGE_BYTES + BESIDE_BYTES


def test_a_file_removed_under_running_engines_does_not_matter(
    smollm2: str, cache: Path, first: ServerProcess, second: ServerProcess
) -> None:
    expected = answer(first, smollm2)
    for path in cache.iterdir():
        os.unlink(path)
    assert answer(first, smollm2) == answer(second, smollm2) == expected
